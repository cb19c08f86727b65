"""Key maps between the text encoders of CompVis' files (keys with the prefix `cond_stage_model.`) and of Stipple.

There are four kinds: the CLIP of Stable Diffusion 1, the open_clip tower of Stable Diffusion 2, and LDM's BERT and its
table of classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conditioning.encoders.clip import POSITION_IDS
from conditioning.encoders.ldm_bert import ldm_bert_config
from conditioning.encoders.open_clip_names import (
    HEAD_DIM,
    TOWER_TOP,
    clip_options,
    count_layers,
    fused_names,
    head_count,
    require_keys,
    table_shape,
    tower_config,
    tower_from_open_clip,
    tower_names,
)
from conditioning.formats.compvis_text_names import bert_names
from stipple_core.files.weights import require_fit

SOURCE = "the text encoder under cond_stage_model."
LOGIT_SCALE = math.log(100)  # at the end of CLIP's training
TOWER = "model."  # prefix of the open_clip tower of Stable Diffusion 2
TRANSFORMER = "transformer."  # prefix of the CLIP of Stable Diffusion 1 and of LDM's BERT
SHORT = ("embeddings.", "encoder.", "final_layer_norm.")  # names in merged files that lack "text_model."

MARKS = {  # kind -> keys, one of which is in every file of that kind
    "clip": tuple(f"transformer.{part}embeddings.token_embedding.weight" for part in ("text_model.", "")),
    "open_clip": ("model.token_embedding.weight",),
    "bert": ("transformer.token_emb.weight",),
    "class": ("embedding.weight",),
}


def kind_of_text(weights: Mapping[str, Any]) -> str | None:
    """Return the kind of encoder that the keys belong to: clip, open_clip, bert, class, or None for any other."""
    return next((kind for kind, names in MARKS.items() if any(name in weights for name in names)), None)


def text_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config.json of an encoder, determined from keys and shapes; `text_from_compvis` returns its weights.

    Raises:
        ValueError: The keys are not of kind clip, open_clip or bert.
    """
    kind, converted = kind_of_text(weights), text_from_compvis(weights)
    try:
        if kind == "clip":
            return _clip_config(converted)
        if kind == "open_clip":
            tower = _without(TOWER, weights)
            layers = count_layers(tower, "transformer.resblocks.") - 1
            return tower_config(tower, source=SOURCE) | {"num_hidden_layers": layers}
        if kind == "bert":
            return _bert_config(converted)
    except KeyError as error:
        raise ValueError(f"{SOURCE} does not fit: {error.args[0]} is missing") from None
    raise _unknown(weights)


def text_from_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a text encoder of CompVis under the names in Stipple's model folders.

    The last block of Stable Diffusion 2's tower is removed, because the tokens are those of the penultimate layer. Its
    projection, its logit scale and position_ids are removed too, as in diffusers' folders.

    Raises:
        ValueError: Keys are missing or unknown; the message names the first five.
    """
    kind = kind_of_text(weights)
    if kind == "clip":
        named = _without(TRANSFORMER, weights)
        named = {f"text_model.{key}" if key.startswith(SHORT) else key: weight for key, weight in named.items()}
        named.pop(POSITION_IDS, None)
        return named
    if kind == "open_clip":
        tower = _without(TOWER, weights)
        return tower_from_open_clip(tower, count_layers(tower, "transformer.resblocks.") - 1, SOURCE)
    if kind == "bert":
        bert = _without(TRANSFORMER, weights)
        names = bert_names(count_layers(bert, "attn_layers.layers.") // 2)
        require_keys(bert, names, names, SOURCE)
        return {name: bert[compvis_name] for compvis_name, name in names.items()}
    if kind == "class":
        require_keys(weights, MARKS["class"], MARKS["class"], SOURCE)
        table_shape(weights, MARKS["class"][0], SOURCE)
        return dict(weights)
    raise _unknown(weights)


def text_to_compvis(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the inverse of `text_from_compvis`, including the keys that it removes, which other programs expect.

    These are position_ids for clip. For open_clip they are a last block with zero outputs, so that the last layer
    equals the penultimate one, an identity matrix as projection, and the logit scale at the end of CLIP's training.

    Args:
        kind: clip | open_clip | bert | class, see `kind_of_text`.
    """
    if kind == "clip":
        length = len(weights[TOWER_TOP["positional_embedding"]])
        return {f"{TRANSFORMER}{name}": w for name, w in {POSITION_IDS: torch.arange(length)[None], **weights}.items()}
    if kind == "open_clip":
        return {f"{TOWER}{name}": weight for name, weight in _with_last_block(weights).items()}
    if kind == "bert":
        names = bert_names(count_layers(weights, "model.layers."))
        return {f"{TRANSFORMER}{compvis_name}": weights[name] for compvis_name, name in names.items()}
    return dict(weights)


def _with_last_block(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an open_clip tower with a last block, made from one without it."""
    layers = count_layers(weights, "text_model.encoder.layers.")
    tower = {tower_name: weights[name] for tower_name, name in tower_names(layers).items()}
    tower |= {name: torch.cat([weights[part] for part in parts]) for name, parts in fused_names(layers).items()}
    block, last = f"transformer.resblocks.{layers - 1}.", f"transformer.resblocks.{layers}."
    extra = {name.replace(block, last): torch.zeros_like(w) for name, w in tower.items() if name.startswith(block)}
    like = tower["ln_final.weight"]
    projection = torch.eye(len(like), dtype=like.dtype)
    return tower | extra | {"text_projection": projection, "logit_scale": torch.tensor(LOGIT_SCALE, dtype=like.dtype)}


def _clip_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab_size, width = table_shape(weights, TOWER_TOP["token_embedding.weight"], SOURCE)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": count_layers(weights, "text_model.encoder.layers."),
        "num_attention_heads": head_count(width, SOURCE),
        "max_position_embeddings": len(weights[TOWER_TOP["positional_embedding"]]),
        "projection_dim": width,
        "pad_token_id": vocab_size - 1,
    }
    return clip_options(sizes)


def _bert_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    vocab_size, width = table_shape(weights, "model.embed_tokens.weight", SOURCE)
    inner = len(weights["model.layers.0.self_attn.q_proj.weight"])
    sizes = {
        "vocab_size": vocab_size,
        "d_model": width,
        "max_position_embeddings": len(weights["model.embed_positions.weight"]),
        "encoder_layers": count_layers(weights, "model.layers."),
        "encoder_ffn_dim": len(weights["model.layers.0.fc1.bias"]),
        "encoder_attention_heads": head_count(inner, SOURCE),
        "head_dim": HEAD_DIM,
    }
    return ldm_bert_config(sizes)


def _without(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without their common prefix. Raises ValueError if one does not have it."""
    require_fit([f"{name} is not known" for name in weights if not name.startswith(prefix)], SOURCE)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def _unknown(weights: Mapping[str, Any]) -> ValueError:
    return ValueError(f"{SOURCE} has keys of an unknown kind: {', '.join(list(weights)[:5])}")
