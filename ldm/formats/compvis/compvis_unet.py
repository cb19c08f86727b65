"""UNets in the single files of CompVis and Stability: their keys, and the config that keys and shapes imply.

Names here are without the prefix `model.diffusion_model.`, which `unet_keys` removes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.formats.compvis.compvis_unet_names import attentions, module_names, renamed
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from stipple_core.files.weights import averaged_keys, misfits, require_fit

NETWORK = "model.diffusion_model."  # prefix in the whole file
QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True, kw_only=True)
class PublishedUNet:
    """Options of a published UNet that its shapes do not determine."""

    sample_size: int  # of the latents that it was trained on
    heads: int | None = None  # on all levels
    head_channels: int | None = None  # of each head, if the same on all levels


SD = (320, 640, 1280, 1280)
KNOWN = {  # by features per level and width of the context
    (SD, 768): PublishedUNet(sample_size=64, heads=8),  # Stable Diffusion 1
    (SD, 1024): PublishedUNet(sample_size=64, head_channels=64),  # Stable Diffusion 2
    (SD, 1280): PublishedUNet(sample_size=32, heads=8),  # text-to-image of 1.45 billion
    ((192, 384, 576, 960), 640): PublishedUNet(sample_size=64, head_channels=32),  # the smaller text-to-image
    ((256, 512, 1024), 512): PublishedUNet(sample_size=32, head_channels=32),  # ImageNet, f = 8
    ((192, 384, 576, 960), 512): PublishedUNet(sample_size=64, heads=1),  # ImageNet, f = 4
    ((448, 896, 1344, 1792), 768): PublishedUNet(sample_size=48, head_channels=32),  # retrieval-augmented
    ((128, 256, 384, 512), 512): PublishedUNet(sample_size=64, head_channels=32),  # layout
    ((224, 448, 672, 896), None): PublishedUNet(sample_size=64, head_channels=32),  # CelebA-HQ, FFHQ, LSUN bedrooms
    ((192, 384, 384, 768, 768), None): PublishedUNet(sample_size=32, heads=8),  # LSUN churches
    ((256, 512, 768, 1024), None): PublishedUNet(sample_size=64, heads=8),  # inpainting
    ((128, 512, 1024), None): PublishedUNet(sample_size=64, heads=8),  # semantic maps
    ((160, 320, 320, 640), None): PublishedUNet(sample_size=64, head_channels=32),  # super-resolution
}


DIMENSIONS = {  # of weights, by the ends of their names
    r"bias$": 1,
    r"(^input_blocks\.0\.0|^out\.2|in_layers\.2|out_layers\.3|conv|op|skip_connection)\.weight$": 4,
    r"(^time_embed\.[02]|emb_layers\.1|attn\d\.to_[qkv])\.weight$": 2,
}


def unet_config(weights: Mapping[str, Tensor], params: Mapping[str, Any] | None = None) -> UNetConfig:
    """Recognize a UNet of LDM, SD1 or SD2 by its keys and shapes.

    Args:
        weights: under CompVis' names.
        params: `model.params.unet_config.params` of its YAML: required for num_heads or num_head_channels of a model
            that is not in `KNOWN`; they override the table. Its image_size is used for such a model only, since SD's
            YAML files have 32 in place of 64. SD2 at 768 pixels has the shapes of SD2 at 512: replace sample_size
            by 96.

    Raises:
        ValueError: it is no such UNet, its heads are unknown, or the YAML is of another model.
    """
    params = dict(params or {})
    try:
        shape = _shape(weights)
    except KeyError as error:
        raise ValueError(f"this is no UNet of LDM: {error.args[0]} is missing") from None
    except (IndexError, ValueError):
        odd = [f"{name} is {list(value.shape)}" for name, value in weights.items() if _is_odd(name, value)]
        more = f"; and {len(odd) - 5} more" if len(odd) > 5 else ""
        details = f": {'; '.join(odd[:5])}{more}" if odd else ""
        raise ValueError(f"this is no UNet of LDM: its weights have other numbers or dimensions{details}") from None
    _require_same(shape, params)
    published = KNOWN.get((shape["block_out_channels"], shape["cross_attention_dim"]))
    return UNetConfig(
        sample_size=published.sample_size if published else params.get("image_size", 64),
        attention_heads=_heads(shape, published, params),
        dropout=params.get("dropout", 0.0),
        **shape,
    )


def _require_same(shape: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Raise ValueError if the YAML is of another model."""
    channels = shape["block_out_channels"]
    of_weights = {
        "in_channels": shape["in_channels"],
        "out_channels": shape["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
    }
    for name, value in of_weights.items():
        values = params.get(name, value)
        if (list(values) if isinstance(value, list) else values) != value:
            raise ValueError(f"{name} is {values} in the YAML and {value} in the weights; give the YAML of this model")
    if shape["attention"] == "plain" and params.get("use_new_attention_order"):
        raise ValueError("use_new_attention_order is not implemented; only UNets without it are")


def _shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of UNetConfig that the weights determine. Raises KeyError with the name of a key that is missing."""
    outputs = sorted({int(key.split(".")[1]) for key in weights if key.startswith("output_blocks.")})
    if not outputs:
        raise KeyError("output_blocks")
    convs, residuals = (
        [at for at in outputs if any(f"output_blocks.{at}.{place}.{key}.weight" in weights for place in (1, 2))]
        for key in ("conv", "in_layers.2")
    )
    layers, *_ = convs + residuals + [len(outputs) - 1]  # before the first step up, one less than a level has blocks
    levels = len(outputs) // (layers + 1)
    firsts = [f"input_blocks.{level * (layers + 1) + 1}" for level in range(levels)]
    plain = "middle_block.1.qkv.weight" in weights
    vector = weights.get("label_emb.0.0.weight")
    channels = tuple(weights[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts)
    return {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_levels": tuple(f"{first}.1.norm.weight" in weights for first in firsts),
        "vector_dim": None if vector is None else vector.shape[1],
        "attention": "plain" if plain else "transformer",
        "resample": "residual" if residuals else "conv",
        "scale_shift": weights["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * channels[-1],
        **({"cross_attention_dim": None} if plain else _transformers(weights)),
    }


def _is_odd(name: str, value: Tensor) -> bool:
    """Whether a weight has other dimensions than its name implies."""
    for pattern, dimensions in DIMENSIONS.items():
        if re.search(pattern, name):
            return value.ndim != dimensions
    return False


def _transformers(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of UNetConfig about spatial transformers, read from the one in the middle."""
    keys = [key for key in weights if key.endswith("attn2.to_k.weight")]
    widths = {weights[key].shape for key in keys}
    itself = len({width for _, width in widths}) > 1 and all(dim == width for dim, width in widths)
    width = weights["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return {
        "cross_attention_dim": None if itself else width,
        "transformer_layers": sum(key.startswith("middle_block.1.") for key in keys),
        "use_linear_projection": weights["middle_block.1.proj_in.weight"].ndim == 2,
    }


def _heads(shape: Mapping[str, Any], published: PublishedUNet | None, params: Mapping[str, Any]) -> tuple[int, ...]:
    """Heads per level: from the YAML, or else from the table."""
    values = {name: params.get(name, -1) for name in ("num_heads", "num_head_channels")}
    if max(values.values()) < 1:
        if published is None:
            raise ValueError(
                f"heads of a UNet of {shape['block_out_channels']} channels with context width "
                f"{shape['cross_attention_dim']} are unknown; specify its YAML, which has num_heads"
            )
        values = {"num_heads": published.heads or -1, "num_head_channels": published.head_channels or -1}
    channels, width = shape["block_out_channels"], values["num_head_channels"]
    if width < 1:
        return (values["num_heads"],) * len(channels)
    for dim, attends in zip(channels, (*shape["attention_levels"][:-1], True), strict=True):
        if attends and dim % width:
            raise ValueError(f"num_head_channels {width} does not divide {dim} channels; give the YAML of this model")
    return tuple(dim // width for dim in channels)


def unet_from_compvis(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Weights in CompVis' names -> Stipple's. Raises ValueError for missing, unexpected or misshapen keys."""
    with torch.device("meta"):
        stipple = UNet(config).state_dict()
    require_fit(misfits(unet_to_compvis(stipple, config), weights), "the UNet")
    names, parts = module_names(config), _split(weights, config)
    return {name: parts[name] if name in parts else weights[renamed(name, names)] for name in stipple}


def unet_to_compvis(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Weights in Stipple's names -> CompVis' names, the exact inverse of `unet_from_compvis`.

    Raises:
        ValueError: naming keys that don't fit the config, or an option that CompVis' UNet does not have.
    """
    for name, value in (("norm_num_groups", 32), ("norm_eps", 1e-5)):
        if getattr(config, name) != value:
            raise ValueError(f"{name} {getattr(config, name)} can't be stored in a CompVis file; only {value} can")
    with torch.device("meta"):
        require_fit(misfits(UNet(config).state_dict(), weights), "the UNet")
    names, fused = module_names(config), _fuse(weights, config)
    if config.attention == "plain":
        weights = {name: value for name, value in weights.items() if not name.rpartition(".")[0].endswith(QKV)}
    return {renamed(name, names): value for name, value in weights.items()} | fused


def _fuse(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Matrices of plain attention as CompVis' convolutions over a line: q, k, v of the first head, of the second..."""
    fused = {}
    for stipple, compvis, heads in attentions(config) if config.attention == "plain" else ():
        for kind in ("weight", "bias"):
            parts = [weights[f"{stipple}.{part}.{kind}"].unflatten(0, (heads, -1)) for part in QKV]
            fused[f"{compvis}.qkv.{kind}"] = torch.stack(parts, dim=1).flatten(0, 2)  # [3 C, C] or [3 C]
        output = weights[f"{stipple}.to_out.0.weight"]
        for name, value in (("qkv", fused[f"{compvis}.qkv.weight"]), ("proj_out", output)):
            fused[f"{compvis}.{name}.weight"] = value.unsqueeze(-1)  # [3 C or C, C, 1]
    return fused


def _split(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The inverse of `_fuse`, in Stipple's names."""
    split = {}
    for stipple, compvis, heads in attentions(config) if config.attention == "plain" else ():
        split[f"{stipple}.to_out.0.weight"] = weights[f"{compvis}.proj_out.weight"].squeeze(-1)  # [C, C]
        for kind, fused in (
            ("weight", weights[f"{compvis}.qkv.weight"].squeeze(-1)),
            ("bias", weights[f"{compvis}.qkv.bias"]),
        ):
            parts = fused.unflatten(0, (heads, 3, -1)).unbind(1)  # each [heads, C / heads, C] or [heads, C / heads]
            split |= {f"{stipple}.{part}.{kind}": value.flatten(0, 1) for part, value in zip(QKV, parts, strict=True)}
    return split


def unet_keys(names: Collection[str]) -> dict[str, str]:
    """The keys of the UNet's weights in a whole file, by names without prefix.

    Weights averaged over training are preferred.

    Raises:
        ValueError: there is no UNet, or an average of a part of it.
    """
    keys = [name for name in names if name.startswith(NETWORK)]
    if not keys:
        raise ValueError(f"no key begins with {NETWORK}; this is no file of a CompVis UNet")
    return {key.removeprefix(NETWORK): place for key, place in averaged_keys(keys, names).items()}
