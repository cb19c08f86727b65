"""First stages of CompVis' latent diffusion: parameter names, and the architecture inferred from keys and shapes.

CompVis' networks differ from those of `Autoencoder` in parameter names, in attention layers, which are 1x1 convolutions
[C, C, 1, 1] instead of matrices [C, C], and in the order of the decoder's levels, which are numbered from the finest.
Each GroupNorm has 32 groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from autoencoder.networks.autoencoder_config import AutoencoderConfig
from stipple_core.files.weights import averaged_keys

GROUPS = 32
ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}  # CompVis -> diffusers
NETWORKS = (
    "encoder.",
    "decoder.",
    "quant_conv.",
    "post_quant_conv.",
    "quantize.",
)  # prefixes of the networks in CompVis' keys
PREFIX = "first_stage_model."  # of all these keys in the file of a whole model
SCALE = "scale_factor"  # a buffer in whole models that were trained with scale_by_std
SCALES = {"kl": 0.18215, "vq": 1.0}  # of published models, the defaults


def first_stage_keys(names: Collection[str]) -> dict[str, str]:
    """Map names of the networks' weights, without prefix, to their keys in a file of a first stage or whole model.

    If the file has averages over training, these are used. Losses and discriminators are ignored.

    Raises:
        ValueError: only some weights have an average.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    bare = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    weights = [
        name.removeprefix(prefix) for name in names if name.startswith(tuple(prefix + part for part in NETWORKS))
    ]
    return {name: prefix + key for name, key in averaged_keys(weights, bare).items()}


def read_scale(state: Mapping[str, Tensor], default: object = None) -> float | None:
    """Return the scale of latents in a file, or else `default`, the value of its YAML file, which may be None.

    Raises:
        ValueError: it is not one positive number.
    """
    value = state.get(SCALE, default)
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else tuple(value.shape)
    if value is None or isinstance(value, int | float) and 0 < value < math.inf:
        return value
    actual = f"of shape {list(value)}" if isinstance(value, tuple) else repr(value)
    raise ValueError(f"{SCALE} is {actual}; the scale of latents is one positive number")


def compvis_config(weights: Mapping[str, Tensor], sample_size: int = 256) -> AutoencoderConfig:
    """Infer the architecture of a first stage from CompVis' keys and shapes.

    Args:
        weights: the weights that `first_stage_keys` finds; some may be missing.
        sample_size: in pixels; informative only, it can't be inferred.

    Raises:
        ValueError: they are not the weights of a KL or VQ autoencoder; the message names what is missing.
    """
    levels = _count(weights, r"encoder\.down\.(\d+)\.")
    if not levels:
        raise ValueError("there is no encoder.down.0 in the weights; they are not those of a KL or VQ autoencoder")
    codes = weights.get("quantize.embedding.weight")
    if codes is None and any(name.startswith("quantize.") for name in weights):
        raise ValueError(
            "there is no quantize.embedding.weight in the weights; only LDM's kind of codebook is supported"
        )
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
    """Convert weights from CompVis' names (`encoder.down.0.block.0...`, see `first_stage_keys`) to `Autoencoder`'s.

    Unknown names are not changed; `stipple_core.files.weights.place` reports them.
    """
    levels = _count(weights, r"decoder\.up\.(\d+)\.")
    converted = {}
    for name, value in weights.items():
        new_name = _diffusers_name(name, levels)
        convolution = ".attentions." in new_name and value.ndim == 4 and value.shape[2:] == (1, 1)
        converted[new_name] = value[:, :, 0, 0] if convolution else value  # [C, C, 1, 1] -> [C, C]
    return converted


def to_compvis(weights: Mapping[str, Tensor], config: AutoencoderConfig) -> dict[str, Tensor]:
    """Convert weights to CompVis' names; the inverse of `from_compvis`.

    Raises:
        ValueError: CompVis' format can't express the architecture.
    """
    if config.norm_num_groups != GROUPS:
        groups = config.norm_num_groups
        raise ValueError(f"norm_num_groups {groups} can't be stored in a CompVis file; only {GROUPS} can")
    levels = _count(weights, r"decoder\.up_blocks\.(\d+)\.")
    converted = {}
    for name, value in weights.items():
        matrix = ".attentions." in name and value.ndim == 2
        converted[_compvis_name(name, levels)] = value[:, :, None, None] if matrix else value  # [C, C] -> [C, C, 1, 1]
    return converted


def _diffusers_name(name: str, levels: int) -> str:
    """Convert a parameter name of CompVis to diffusers', for an autoencoder with this number of levels."""
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
    """Convert a parameter name of diffusers to CompVis', for an autoencoder with this number of levels."""
    attention = {new: old for old, new in ATTENTION.items()}
    layers = "|".join(map(re.escape, attention))
    name = re.sub(rf"(attentions\.\d+)\.({layers})\.", lambda m: f"{m[1]}.{attention[m[2]]}.", name)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")
    name = re.sub(r"\.(down|up)samplers\.0\.conv\.", r".\1sample.conv.", name)
    name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.")
    name = re.sub(r"\.mid_block\.resnets\.([01])\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"\.attentions\.(\d+)\.", r".attn.\1.", name)
    name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
    return re.sub(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", name)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """Count the different numbers that the keys have in the group of a pattern."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a convolution's weight. Raises ValueError if it is missing or has another number of dimensions."""
    if name not in weights or weights[name].ndim != 4:
        problem = f"is {list(weights[name].shape)}" if name in weights else "is missing"
        raise ValueError(f"{name} {problem}; this is not the first stage of a KL or VQ autoencoder")
    return tuple(weights[name].shape)


def _codebook(codes: Tensor, z_channels: int) -> dict[str, int | None]:
    """The options of a codebook [size, channels]."""
    if codes.ndim != 2:
        raise ValueError(f"quantize.embedding.weight is {list(codes.shape)}; a codebook is [number of codes, channels]")
    size, channels = codes.shape
    return {"codebook_size": size, "codebook_dim": None if channels == z_channels else channels}
