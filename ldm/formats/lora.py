"""Low-rank adaptations of weights (Hu et al. 2021, LoRA), in the file formats of diffusers and Kohya's scripts.

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
METADATA = "lora_adapter_metadata"  # key of ranks and alphas in diffusers' files, as JSON
UNET, ENCODER = "unet", "text_encoder"  # names of networks in diffusers
PREFIXES = {  # prefixes of weights in diffusers and Kohya's scripts
    "unet.": UNET,
    "lora_unet_": UNET,
    "text_encoder.": ENCODER,
    "lora_te_": ENCODER,
    "lora_te1_": ENCODER,
}
KOHYA_PREFIXES = {UNET: "lora_unet_", ENCODER: "lora_te_"}
PARTS = {  # suffixes of weights in peft, Kohya's scripts, and two earlier versions of diffusers
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
PEFT_ALPHA = 8.0  # default of peft


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The update of one weight: scale * up down."""

    down: Tensor  # [rank, in], or of a convolution [rank, in, h, w]
    up: Tensor  # [out, rank], or [out, rank, 1, 1]
    alpha: float  # of the scale alpha / rank
    root: bool = False  # scale alpha / sqrt(rank) instead (Kalajdzievski 2023, rank-stabilized LoRA)

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)

    def fits(self, weight: Tensor) -> bool:
        """Whether it can be added to a weight of shape [out, in, ...]."""
        return (len(self.up), self.down[0].numel(), self.rank) == (len(weight), weight[0].numel(), self.up[0].numel())

    def product(self) -> Tensor:
        """[out, in * h * w], in float32."""
        return self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float())


@dataclass(frozen=True)
class Lora:
    """An adaptation of one or two networks.

    Args:
        layers: by network and name of the layer, whose dots may be underscores.
        source: the file, for messages.
    """

    layers: Mapping[tuple[str, str], LowRank]
    source: str = "this LoRA"


def read_lora(path: str | os.PathLike) -> Lora:
    """Read a file, or the folder that training writes.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or is not a LoRA.
    """
    source, path = Path(path), Path(path) / DIFFUSERS_FILE if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no LoRA in {source}; use a file, or the folder that training writes, RUN/lora"
        )
    weights, halves, unknown = read_weights(path), {}, []
    for key, value in weights.items():
        network, layer, part = _parsed(key)
        if part is None:
            unknown.append(key)
        else:
            halves.setdefault((network, layer), {})[part] = value
    if unknown or not halves:
        content = f"it has {', '.join(unknown[:3])}" if unknown else "it is empty"
        raise ValueError(f"{path} is no plain LoRA of a UNet and its text encoder: {content}; use another file")
    if wrong := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{path} has values that are not finite in {wrong[0]}; get it again")
    for (network, layer), parts in halves.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(f"{path} has one half only of {network} {layer}; get it again")
    metadata = _metadata(path)
    return Lora({place: _low_rank(place, parts, metadata) for place, parts in halves.items()}, str(path))


@torch.no_grad()
def merge(lora: Lora, weight: float, unet: nn.Module, encoder: nn.Module | None) -> None:
    """Add an adaptation to a UNet and a text encoder, in place. At weight 0 not a bit changes.

    Raises:
        ValueError: a layer does not exist or has another shape; raised before anything is changed.
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
        )  # keeps the memory layout (stipple_core.operators.winograd)


def save_lora(lora: Lora, folder: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write both files into a folder, with full names of layers. dtype None keeps the dtype of the weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    diffusers, kohyas, metadata = {}, {}, {}
    for (network, layer), low in lora.layers.items():
        halves = {"down": low.down.to(dtype), "up": low.up.to(dtype)}
        diffusers |= {
            f"{network}.{layer}.lora_A.weight": halves["down"],
            f"{network}.{layer}.lora_B.weight": halves["up"],
        }
        kohya = KOHYA_PREFIXES[network] + _flat(layer)
        kohyas |= {f"{kohya}.lora_{part}.weight": half for part, half in halves.items()}
        kohyas[f"{kohya}.alpha"] = torch.tensor(low.alpha)
        metadata[f"{network}.r"], metadata[f"{network}.lora_alpha"] = low.rank, low.alpha
        ending = layer.removeprefix("text_model.")  # which transformers 5 omits; peft compares endings
        metadata.setdefault(f"{network}.target_modules", []).append(ending)
    first = next(iter(lora.layers.values()))
    about = {"ss_network_module": "networks.lora", "ss_network_dim": f"{first.rank}"}
    write_weights(kohyas, folder / KOHYA_FILE, about | {"ss_network_alpha": f"{first.alpha:g}"})
    write_weights(diffusers, folder / DIFFUSERS_FILE, {METADATA: json.dumps(metadata, indent=2, sort_keys=True)})


def _parsed(key: str) -> tuple[str, str, str | None]:
    """Network, layer and part of a name; the part is None if the name is unknown."""
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    ending = next((ending for ending in PARTS if key.endswith(f".{ending}")), None)
    if prefix is None or ending is None:
        return "", key, None
    return PREFIXES[prefix], key.removeprefix(prefix).removesuffix(f".{ending}"), PARTS[ending]


def _low_rank(place: tuple[str, str], parts: Mapping[str, Tensor], metadata: Mapping[str, object]) -> LowRank:
    """A layer's halves with its alpha: in the file, else in its metadata, else the rank."""
    network, layer = place
    options = {
        key.removeprefix(f"{network}."): value for key, value in metadata.items() if key.startswith(f"{network}.")
    }
    alpha = float(len(parts["down"]))
    if "alpha" in parts:
        alpha = float(parts["alpha"])
    elif options:
        patterns = options.get("alpha_pattern") or {}
        fitting = (value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", layer))  # peft's rule
        alpha = float(next(fitting, options.get("lora_alpha", PEFT_ALPHA)))
    return LowRank(down=parts["down"], up=parts["up"], alpha=alpha, root=bool(options.get("use_rslora")))


def _metadata(path: Path) -> dict[str, object]:
    """The metadata that diffusers stores beside the weights."""
    try:
        values = json.loads(read_metadata(path).get(METADATA, "{}"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} has {METADATA} that can't be read; get it again")
    return values


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights of layers by their flat names; of text encoders also without the prefixes that vary."""
    named = {_flat(name): module.weight for name, module in network.named_modules() if hasattr(module, "weight")}
    bare = {name.removeprefix("model_").removeprefix("text_model_"): weight for name, weight in named.items()}
    return {f"text_model_{name}": weight for name, weight in bare.items()} | bare | named


def _flat(name: str) -> str:
    return name.replace(".", "_")
