"""Key map between the text towers of open_clip and the CLIPTextModel of transformers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor

from conditioning.encoders.clip import DEFAULTS
from conditioning.encoders.clip import MARK as CLIP_MARK
from stipple_core.files.weights import require_fit

TOWER = "the text tower of open_clip"
HEAD_DIM = 64  # width of the heads in all CLIPs that CompVis' programs use
UNUSED = {  # keys of a tower that tokens do not depend on
    *("text_projection", "text_projection.weight", "text_projection.bias"),
    *("logit_scale", "logit_bias", "attn_mask"),
}
TOWER_TOP = {  # open_clip -> transformers
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TOWER_LAYER = {  # of each layer
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def tower_config(
    weights: Mapping[str, Tensor], heads: int | None = None, activation: str = "gelu", source: str = TOWER
) -> dict[str, Any]:
    """Return the CLIPTextModel config.json of an open_clip tower.

    Args:
        heads: Number of attention heads; None for heads of width 64.
        source: What the weights are, for error messages.
    """
    vocab_size, width = table_shape(weights, "token_embedding.weight", source)
    projection = weights.get("text_projection")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": count_layers(weights, "transformer.resblocks."),
        "num_attention_heads": heads or head_count(width, source),
        "max_position_embeddings": len(weights["positional_embedding"]),
        "projection_dim": width if projection is None else projection.shape[1],
        "pad_token_id": 0,
    }
    return clip_options(sizes) | {"hidden_act": activation}


def tower_from_open_clip(weights: Mapping[str, Tensor], layers: int, source: str = TOWER) -> dict[str, Tensor]:
    """Return the first `layers` layers of an open_clip tower under the names of a CLIPTextModel.

    open_clip stores q, k and v in one matrix, which is split. Raises ValueError for keys that are missing or unknown.
    """
    names, fused = tower_names(layers), fused_names(layers)
    surplus = {name for name in weights if name.startswith("transformer.resblocks.") and _layer(name) >= layers}
    require_keys(weights, {*names, *fused, *surplus, *UNUSED}, {**names, **fused}, source)
    renamed = {name: weights[tower_name] for tower_name, name in names.items()}
    for tower_name, parts in fused.items():
        renamed |= zip(parts, weights[tower_name].chunk(3), strict=True)  # [3 d, d] -> 3 times [d, d]
    return renamed


def tower_names(layers: int) -> dict[str, str]:
    """Return the map from open_clip's names to transformers' names, without q, k and v."""
    names = dict(TOWER_TOP)
    for n in range(layers):
        for end in ("weight", "bias"):
            block, layer = f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
            names |= {f"{block}.{key}.{end}": f"{layer}.{name}.{end}" for key, name in TOWER_LAYER.items()}
    return names


def fused_names(layers: int) -> dict[str, list[str]]:
    """Return the map from open_clip's names of fused q, k and v to transformers' three names."""
    return {
        f"transformer.resblocks.{n}.attn.in_proj_{end}": [
            f"text_model.encoder.layers.{n}.self_attn.{part}_proj.{end}" for part in "qkv"
        ]
        for n in range(layers)
        for end in ("weight", "bias")
    }


def clip_options(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a CLIPTextModel; its start and end are the last two tokens of the vocabulary."""
    ends = {"bos_token_id": sizes["vocab_size"] - 2, "eos_token_id": sizes["vocab_size"] - 1}
    return {**DEFAULTS, **sizes, **ends, **CLIP_MARK}


def table_shape(weights: Mapping[str, Tensor], name: str, source: str) -> tuple[int, int]:
    """Return rows and columns of a weight. Raises ValueError if it has another number of dimensions."""
    shape = tuple(weights[name].shape)
    if len(shape) != 2:
        raise ValueError(f"{source} does not fit: {name} is {list(shape)}, not a table")
    return shape


def head_count(width: int, source: str) -> int:
    """Return the number of heads of width 64. Raises ValueError if the width is not a multiple of it."""
    if not width or width % HEAD_DIM:
        raise ValueError(f"{source} does not fit: width {width} is not a multiple of {HEAD_DIM}, the width of a head")
    return width // HEAD_DIM


def require_keys(weights: Iterable[str], allowed: Container[str], required: Iterable[str], source: str) -> None:
    """Raise ValueError that names keys of the weights that are missing or not allowed."""
    wrong = [f"{name} is missing" for name in required if name not in weights]
    require_fit([*wrong, *(f"{name} is not known" for name in weights if name not in allowed)], source)


def count_layers(weights: Iterable[str], prefix: str) -> int:
    """Return how many different numbers follow a prefix in the names of weights."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _layer(name: str) -> int:
    """Return N of transformer.resblocks.N..."""
    return int(name.split(".")[2])
