"""The first stages of CompVis' latent diffusion: parameter names, and the architecture told from keys and shapes.

Its networks are ours but for names, for attention as 1x1 convolutions [C, C, 1, 1] where we have matrices [C, C], and
for the order of the decoder's levels, which it counts from the finest. Every GroupNorm has 32 groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from autoencoder.networks.autoencoder_config import AutoencoderConfig
from stipple_core.files.weights import averaged_keys

GROUPS = 32
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}  # CompVis -> ours
OWN = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")  # CompVis' keys of the networks
PREFIX = "first_stage_model."  # before them in the file of a whole model
SCALE = "scale_factor"  # a buffer of whole models that were trained with scale_by_std
SCALES = {"kl": 0.18215, "vq": 1.0}  # of published models, where nothing says another


def first_stage_keys(names: Collection[str]) -> dict[str, str]:
    """Where in a file of a first stage, or of a whole model, the networks' weights are: keys by name without prefix.

    They are those of averages over training, if there are any. Losses, discriminators, and what else lies in
    training's files are left out.

    Raises:
        ValueError: half of the weights are averaged.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    bare = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    own = [name.removeprefix(prefix) for name in names if name.startswith(tuple(prefix + part for part in OWN))]
    return {name: prefix + key for name, key in averaged_keys(own, bare).items()}


def read_scale(state: Mapping[str, Tensor], said: object = None) -> float | None:
    """The scale of latents that a file says, else what its YAML said; None where neither does.

    Raises:
        ValueError: it is not one positive number.
    """
    value = state.get(SCALE, said)
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else tuple(value.shape)
    if value is None or isinstance(value, int | float) and 0 < value < math.inf:
        return value
    found = f"of shape {list(value)}" if isinstance(value, tuple) else repr(value)
    raise ValueError(f"{SCALE} is {found}; the scale of latents is one positive number")


def compvis_config(weights: Mapping[str, Tensor], sample_size: int = 256) -> AutoencoderConfig:
    """The architecture of a first stage, from CompVis' keys and shapes.

    Args:
        weights: as `first_stage_keys` finds them, all of them or those of a file that may be damaged.
        sample_size: in pixels; informative, and not to be told from weights.

    Raises:
        ValueError: they are not those of a KL or VQ autoencoder; the message names what is missed.
    """
    levels = _count(weights, r"encoder\.down\.(\d+)\.")
    if not levels:
        raise ValueError("there is no encoder.down.0 in the weights; they are not those of a KL or VQ autoencoder")
    codes = weights.get("quantize.embedding.weight")
    if codes is None and any(name.startswith("quantize.") for name in weights):
        raise ValueError("there is no quantize.embedding.weight in the weights; of codebooks only LDM's is implemented")
    z_channels = _shape(weights, "decoder.conv_in.weight")[1]
    return AutoencoderConfig(
        regularizer="kl" if codes is None else "vq",
        in_channels=_shape(weights, "encoder.conv_in.weight")[1],
        latent_channels=z_channels,
        block_out_channels=tuple(_shape(weights, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)),
        layers_per_block=_count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        attention_levels=tuple(f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(levels)),
        mid_attention="encoder.mid.attn_1.q.weight" in weights,
        norm_num_groups=GROUPS,
        sample_size=sample_size,
        **({} if codes is None else _codebook(codes, z_channels)),
    )


def from_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's weights in our names, from CompVis' (`encoder.down.0.block.0...`, see `first_stage_keys`).

    A name that is unknown stays as it is, for `stipple_core.files.weights.place` to complain of.
    """
    levels = _count(weights, r"decoder\.up\.(\d+)\.")
    converted = {}
    for name, value in weights.items():
        ours = _our_name(name, levels)
        convolution = ".attentions." in ours and value.ndim == 4 and value.shape[2:] == (1, 1)
        converted[ours] = value[:, :, 0, 0] if convolution else value  # [C, C, 1, 1] -> [C, C]
    return converted


def to_compvis(weights: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """An autoencoder's weights in CompVis' names, from ours; the inverse of `from_compvis`.

    Raises:
        ValueError: CompVis has no such autoencoder.
    """
    if config.norm_num_groups != GROUPS:
        groups = config.norm_num_groups
        raise ValueError(f"norm_num_groups {groups} can't be said in a CompVis file; only {GROUPS} can")
    levels = _count(weights, r"decoder\.up_blocks\.(\d+)\.")
    converted = {}
    for name, value in weights.items():
        matrix = ".attentions." in name and value.ndim == 2
        converted[_compvis_name(name, levels)] = value[:, :, None, None] if matrix else value  # [C, C] -> [C, C, 1, 1]
    return converted


def _our_name(name: str, levels: int) -> str:
    """Our name of a CompVis parameter, in an autoencoder of so many levels."""
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    name = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", name)
    name = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", name)
    name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
    layers = "|".join(ATTENTION)
    return re.sub(rf"(attentions\.\d+)\.({layers})\.", lambda m: f"{m[1]}.{ATTENTION[m[2]]}.", name)


def _compvis_name(name: str, levels: int) -> str:
    """CompVis' name of a parameter of ours, in an autoencoder of so many levels."""
    theirs = {ours: layer for layer, ours in ATTENTION.items()}
    layers = "|".join(map(re.escape, theirs))
    name = re.sub(rf"(attentions\.\d+)\.({layers})\.", lambda m: f"{m[1]}.{theirs[m[2]]}.", name)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")
    name = re.sub(r"\.(down|up)samplers\.0\.conv\.", r".\1sample.conv.", name)
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.")
    name = re.sub(r"\.mid_block\.resnets\.([01])\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"\.attentions\.(\d+)\.", r".attn.\1.", name)
    name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
    return re.sub(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", name)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the keys have at the group of a pattern."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a convolution's weight; ValueError where it is not there or is none."""
    if name not in weights or weights[name].ndim != 4:
        found = f"is {list(weights[name].shape)}" if name in weights else "is missing"
        raise ValueError(f"{name} {found}; the first stage is not that of a KL or VQ autoencoder")
    return tuple(weights[name].shape)


def _codebook(codes: Tensor, z_channels: int) -> dict[str, int | None]:
    """The options of a codebook [size, channels]."""
    if codes.ndim != 2:
        raise ValueError(f"quantize.embedding.weight is {list(codes.shape)}; a codebook is [number of codes, channels]")
    size, channels = codes.shape
    return {"codebook_size": size, "codebook_dim": None if channels == z_channels else channels}
