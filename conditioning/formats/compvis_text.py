"""Key maps between CompVis' text encoders (what follows `cond_stage_model.` in a single file) and ours.

Four kinds: Stable Diffusion 1's CLIP, Stable Diffusion 2's open_clip tower, LDM's BERT and its table of classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conditioning.encoders.clip import DEFAULTS, POSITION_IDS
from conditioning.encoders.clip import MARK as CLIP_MARK
from conditioning.encoders.ldm_bert import ldm_bert_config
from conditioning.formats.compvis_text_names import TOWER_TOP, bert_names, fused_names, tower_names
from stipple_core.files.weights import require_fit

SOURCE = "the text encoder under cond_stage_model."
HEAD_DIM = 64  # of every CLIP of these families, and of LDM's BERT
LOGIT_SCALE = math.log(100)  # where CLIP's training ends
TOWER = "model."  # before the names of Stable Diffusion 2's open_clip tower
TRANSFORMER = "transformer."  # before those of Stable Diffusion 1's CLIP and of LDM's BERT
SHORT = ("embeddings.", "encoder.", "final_layer_norm.")  # names of a CLIP that lost "text_model." in a merge

MARKS = {  # kind -> keys of which one is in all its files
    "clip": tuple(f"transformer.{part}embeddings.token_embedding.weight" for part in ("text_model.", "")),
    "open_clip": ("model.token_embedding.weight",),
    "bert": ("transformer.token_emb.weight",),
    "class": ("embedding.weight",),
}

UNUSED = {"text_projection", "text_projection.weight", "text_projection.bias", "logit_scale", "logit_bias", "attn_mask"}


def kind_of_text(weights: Mapping[str, Any]) -> str | None:
    """Which encoder the keys belong to: clip | open_clip | bert | class; None for any other, or none."""
    return next((kind for kind, names in MARKS.items() if any(name in weights for name in names)), None)


def text_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json of the encoder that `text_from_compvis` gives the weights of, from keys and shapes.

    Raises:
        ValueError: the keys are neither of kind clip, open_clip nor bert.
    """
    kind, ours = kind_of_text(weights), text_from_compvis(weights)
    try:
        if kind == "clip":
            return _clip_config(ours)
        if kind == "open_clip":
            tower = _without(TOWER, weights)
            return tower_config(tower) | {"num_hidden_layers": _count(tower, "transformer.resblocks.") - 1}
        if kind == "bert":
            return _bert_config(ours)
    except KeyError as error:
        raise ValueError(f"{SOURCE} does not fit: {error.args[0]} is missing") from None
    raise _unknown(weights)


def text_from_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CompVis text encoder's weights by the names that our folders have.

    Of Stable Diffusion 2's tower all but the last block is taken (the tokens are the penultimate layer's), and neither
    projection nor logit scale, as in diffusers' folders; position_ids are dropped.

    Raises:
        ValueError: naming the first five keys that are missing or have no place.
    """
    kind = kind_of_text(weights)
    if kind == "clip":
        named = _without(TRANSFORMER, weights)
        named = {f"text_model.{key}" if key.startswith(SHORT) else key: weight for key, weight in named.items()}
        named.pop(POSITION_IDS, None)
        return named
    if kind == "open_clip":
        tower = _without(TOWER, weights)
        return tower_from_open_clip(tower, _count(tower, "transformer.resblocks.") - 1)
    if kind == "bert":
        bert = _without(TRANSFORMER, weights)
        names = bert_names(_count(bert, "attn_layers.layers.") // 2)
        _require_known(bert, names, names)
        return {ours: bert[theirs] for theirs, ours in names.items()}
    if kind == "class":
        _require_known(weights, MARKS["class"], MARKS["class"])
        _sides(weights, MARKS["class"][0])
        return dict(weights)
    raise _unknown(weights)


def text_to_compvis(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The inverse of `text_from_compvis`; what that left out is made anew, because other programs expect the keys.

    That is position_ids (clip); for open_clip a last block whose outputs are zero, so that the last layer equals the
    penultimate one, an identity as projection, and the logit scale at which CLIP's training ends.

    Args:
        kind: clip | open_clip | bert | class, as `kind_of_text` says it.
    """
    if kind == "clip":
        length = len(weights[TOWER_TOP["positional_embedding"]])
        return {f"{TRANSFORMER}{name}": w for name, w in {POSITION_IDS: torch.arange(length)[None], **weights}.items()}
    if kind == "open_clip":
        return {f"{TOWER}{name}": weight for name, weight in _with_last_block(weights).items()}
    if kind == "bert":
        names = bert_names(_count(weights, "model.layers."))
        return {f"{TRANSFORMER}{theirs}": weights[ours] for theirs, ours in names.items()}
    return dict(weights)


def tower_config(weights: Mapping[str, Tensor], heads: int | None = None, activation: str = "gelu") -> dict[str, Any]:
    """config.json of an open_clip tower as a CLIPTextModel; heads None says that they are 64 wide."""
    vocab_size, width = _sides(weights, "token_embedding.weight")
    projection = weights.get("text_projection")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": _count(weights, "transformer.resblocks."),
        "num_attention_heads": heads or _heads(width),
        "max_position_embeddings": len(weights["positional_embedding"]),
        "projection_dim": width if projection is None else projection.shape[1],
        "pad_token_id": 0,
    }
    return _clip_options(sizes) | {"hidden_act": activation}


def tower_from_open_clip(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The first `layers` blocks of an open_clip tower by the names of a CLIPTextModel; q, k and v are taken apart."""
    names, fused = tower_names(layers), fused_names(layers)
    surplus = {name for name in weights if name.startswith("transformer.resblocks.") and _number(name) >= layers}
    _require_known(weights, {*names, *fused, *surplus, *UNUSED}, {**names, **fused})
    named = {ours: weights[theirs] for theirs, ours in names.items()}
    for theirs, parts in fused.items():
        named |= zip(parts, weights[theirs].chunk(3), strict=True)  # [3 d, d] -> 3 times [d, d]
    return named


def _with_last_block(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole open_clip tower out of one without its last block."""
    layers = _count(weights, "text_model.encoder.layers.")
    tower = {theirs: weights[ours] for theirs, ours in tower_names(layers).items()}
    tower |= {theirs: torch.cat([weights[part] for part in parts]) for theirs, parts in fused_names(layers).items()}
    block, last = f"transformer.resblocks.{layers - 1}.", f"transformer.resblocks.{layers}."
    extra = {name.replace(block, last): torch.zeros_like(w) for name, w in tower.items() if name.startswith(block)}
    like = tower["ln_final.weight"]
    projection = torch.eye(len(like), dtype=like.dtype)
    return tower | extra | {"text_projection": projection, "logit_scale": torch.tensor(LOGIT_SCALE, dtype=like.dtype)}


def _clip_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab_size, width = _sides(weights, TOWER_TOP["token_embedding.weight"])
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": _count(weights, "text_model.encoder.layers."),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": len(weights[TOWER_TOP["positional_embedding"]]),
        "projection_dim": width,
        "pad_token_id": vocab_size - 1,
    }
    return _clip_options(sizes)


def _clip_options(sizes: dict[str, Any]) -> dict[str, Any]:
    """A CLIPTextModel's config.json; start and end are the last two of CLIP's tokens."""
    ends = {"bos_token_id": sizes["vocab_size"] - 2, "eos_token_id": sizes["vocab_size"] - 1}
    return {**DEFAULTS, **sizes, **ends, **CLIP_MARK}


def _bert_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab_size, width = _sides(weights, "model.embed_tokens.weight")
    inner = len(weights["model.layers.0.self_attn.q_proj.weight"])
    sizes = {
        "vocab_size": vocab_size,
        "d_model": width,
        "max_position_embeddings": len(weights["model.embed_positions.weight"]),
        "encoder_layers": _count(weights, "model.layers."),
        "encoder_ffn_dim": len(weights["model.layers.0.fc1.bias"]),
        "encoder_attention_heads": _heads(inner),
        "head_dim": HEAD_DIM,
    }
    return ldm_bert_config(sizes)


def _sides(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Rows and columns of a table."""
    shape = tuple(weights[name].shape)
    if len(shape) != 2:
        raise ValueError(f"{SOURCE} does not fit: {name} is {list(shape)}, not a table")
    return shape


def _heads(width: int) -> int:
    if not width or width % HEAD_DIM:
        raise ValueError(f"{SOURCE} does not fit: width {width} is no multiple of {HEAD_DIM}, the width of its heads")
    return width // HEAD_DIM


def _require_known(weights: Mapping[str, Any], known: Any, required: Any) -> None:
    wrong = [f"{name} is missing" for name in required if name not in weights]
    require_fit([*wrong, *(f"{name} is not known" for name in weights if name not in known)], SOURCE)


def _without(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights without their common prefix."""
    require_fit([f"{name} is not known" for name in weights if not name.startswith(prefix)], SOURCE)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def _count(weights: Mapping[str, Any], prefix: str) -> int:
    """How many numbers follow a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _number(name: str) -> int:
    """N of transformer.resblocks.N..."""
    return int(name.split(".")[2])


def _unknown(weights: Mapping[str, Any]) -> ValueError:
    return ValueError(f"{SOURCE} has keys of no known kind: {', '.join(list(weights)[:5])}")
