"""Low-rank adaptations of a model's weights (Hu et al. 2021, LoRA), in the files of diffusers and of Kohya's scripts.

W <- W + weight * alpha / rank * B A, with A [rank, in] and B [out, rank]; convolutions are matrices [out, in * h * w].
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stipple_core.files.weights import read_metadata, read_weights, write_weights

DIFFUSERS_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps ranks and alphas, as JSON
UNET, ENCODER = "unet", "text_encoder"  # networks of a model, as diffusers names them
PREFIXES = {  # how names of their weights begin: diffusers', Kohya's
    "unet.": UNET,
    "lora_unet_": UNET,
    "text_encoder.": ENCODER,
    "lora_te_": ENCODER,
    "lora_te1_": ENCODER,
}
KOHYA_PREFIXES = {UNET: "lora_unet_", ENCODER: "lora_te_"}
PARTS = {  # how names of their weights end: peft's, Kohya's, two earlier ones of diffusers
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}
PEFT_ALPHA = 8.0  # where metadata leave it out


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What is added to one weight: scale * up down."""

    down: Tensor  # [rank, in], or of a convolution [rank, in, h, w]
    up: Tensor  # [out, rank], or [out, rank, 1, 1]
    alpha: float  # of the scale alpha / rank
    root: bool = False  # the scale is alpha / sqrt(rank) instead (Kalajdzievski 2023, rank-stabilized LoRA)

    @property
    def rank(self) -> int:
        """Of what is added."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    def fits(self, weight: Tensor) -> bool:
        """Whether it can be added to a weight [out, in, ...]."""
        return (len(self.up), self.down[0].numel(), self.rank) == (len(weight), weight[0].numel(), self.up[0].numel())

    def product(self) -> Tensor:
        """[out, in * h * w], in float32."""
        return self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float())


@dataclass(frozen=True)
class Lora:
    """An adaptation of one or two networks.

    Args:
        layers: by network and the layer's name in it, whose dots may be underscores.
        source: where it was read.
    """

    layers: Mapping[tuple[str, str], LowRank]
    source: str = "this LoRA"


def read_lora(path: str | os.PathLike) -> Lora:
    """Read a file, or the folder that training leaves.

    Raises:
        FileNotFoundError, ValueError: in one line: not there, damaged, or it holds what is no LoRA.
    """
    given, path = Path(path), Path(path) / DIFFUSERS_FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no LoRA is in {given}; give a file, or the folder that training leaves, RUN/lora")
    weights, found, unknown = read_weights(path), {}, []
    for key, value in weights.items():
        network, layer, part = _parsed(key)
        if part is None:
            unknown.append(key)
        else:
            found.setdefault((network, layer), {})[part] = value
    if unknown or not found:
        told = f"it has {', '.join(unknown[:3])}" if unknown else "it is empty"
        raise ValueError(f"{path} is no plain LoRA of a UNet and its text encoder: {told}; give one that is")
    if wrong := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{path} has values that are not finite in {wrong[0]}; get it again")
    for (network, layer), parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(f"{path} has one half only of {network} {layer}; get it again")
    said = _metadata(path)
    return Lora({place: _low_rank(place, parts, said) for place, parts in found.items()}, str(path))


@torch.no_grad()
def merge(lora: Lora, weight: float, unet: nn.Module, encoder: nn.Module | None) -> None:
    """Add an adaptation to a UNet and a text encoder, in place: at weight 0 nothing changes, not a bit.

    Raises:
        ValueError: naming what of it has no place in these networks, before anything is changed.
    """
    places = {UNET: _weights(unet), ENCODER: {} if encoder is None else _weights(encoder)}
    named = {place: places[place[0]].get(_flat(place[1])) for place in lora.layers}
    wrong = [f"{place[0]} has no layer {place[1]}" for place, target in named.items() if target is None]
    wrong += [
        f"{network} {layer} is {list(named[network, layer].shape)} here"
        for (network, layer), low in lora.layers.items()
        if named[network, layer] is not None and not low.fits(named[network, layer])
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{lora.source} was not made for this model: {'; '.join(wrong[:3])}{more}")
    if weight == 0:
        return
    for place, low in lora.layers.items():
        target = named[place]
        added = weight * low.product().to(target.device)
        target.copy_(
            target.float() + added.view(target.shape)
        )  # into the memory as it lies (stipple_core.operators.winograd)


def save_lora(lora: Lora, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write both files into a folder; layers have their full names. dtype None keeps that of the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    theirs, kohyas, said = {}, {}, {}
    for (network, layer), low in lora.layers.items():
        halves = {"down": low.down.to(dtype), "up": low.up.to(dtype)}
        theirs |= {f"{network}.{layer}.lora_A.weight": halves["down"], f"{network}.{layer}.lora_B.weight": halves["up"]}
        kohya = KOHYA_PREFIXES[network] + _flat(layer)
        kohyas |= {f"{kohya}.lora_{part}.weight": half for part, half in halves.items()}
        kohyas[f"{kohya}.alpha"] = torch.tensor(low.alpha)
        said[f"{network}.r"], said[f"{network}.lora_alpha"] = low.rank, low.alpha
        ending = layer.removeprefix("text_model.")  # which transformers 5 leaves out, and peft compares endings
        said.setdefault(f"{network}.target_modules", []).append(ending)
    first = next(iter(lora.layers.values()))
    about = {"ss_network_module": "networks.lora", "ss_network_dim": f"{first.rank}"}
    write_weights(kohyas, folder / KOHYA_FILE, about | {"ss_network_alpha": f"{first.alpha:g}"})
    write_weights(theirs, folder / DIFFUSERS_FILE, {METADATA: json.dumps(said, indent=2, sort_keys=True)})


def _parsed(key: str) -> tuple[str, str, str | None]:
    """Network, layer and part of a name; the part is None where it is none of ours."""
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    ending = next((ending for ending in PARTS if key.endswith(f".{ending}")), None)
    if prefix is None or ending is None:
        return "", key, None
    return PREFIXES[prefix], key.removeprefix(prefix).removesuffix(f".{ending}"), PARTS[ending]


def _low_rank(place: tuple[str, str], parts: Mapping[str, Tensor], said: Mapping[str, object]) -> LowRank:
    """A layer's halves with its alpha: in the file, else in its metadata, else the rank."""
    network, layer = place
    own = {key.removeprefix(f"{network}."): value for key, value in said.items() if key.startswith(f"{network}.")}
    alpha = float(len(parts["down"]))
    if "alpha" in parts:
        alpha = float(parts["alpha"])
    elif own:
        patterns = own.get("alpha_pattern") or {}
        fitting = (value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", layer))  # peft's rule
        alpha = float(next(fitting, own.get("lora_alpha", PEFT_ALPHA)))
    return LowRank(down=parts["down"], up=parts["up"], alpha=alpha, root=bool(own.get("use_rslora")))


def _metadata(path: Path) -> dict[str, object]:
    """What diffusers says of an adaptation beside its weights."""
    try:
        said = json.loads(read_metadata(path).get(METADATA, "{}"))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"{path} has {METADATA} that are not readable; get it again")
    return said


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights of layers by their flat names, for some text encoders with and without the prefix that varies."""
    named = {_flat(name): module.weight for name, module in network.named_modules() if hasattr(module, "weight")}
    bare = {name.removeprefix("model_").removeprefix("text_model_"): weight for name, weight in named.items()}
    return {f"text_model_{name}": weight for name, weight in bare.items()} | bare | named


def _flat(name: str) -> str:
    return name.replace(".", "_")
