"""Conditioners out of CompVis' single files, and their weights back as such a file has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from conditioning.build import AnyConditioner
from conditioning.classes.class_conditioner import ClassConditioner, Unconditional, class_conditioner
from conditioning.encoders.clip import Clip, empty_clip
from conditioning.encoders.ldm_bert import LdmBert, empty_ldm_bert
from conditioning.formats.compvis_text import (
    HEAD_DIM,
    SOURCE,
    kind_of_text,
    text_config,
    text_from_compvis,
    text_to_compvis,
)
from conditioning.layouts.layout_tokenizer import VOCAB_SIZE as LAYOUTS
from conditioning.layouts.layout_tokenizer import LayoutTokenizer
from conditioning.text.text_conditioner import Conditioner
from conditioning.tokenizers.clip_bpe import END, VOCAB_SIZE
from conditioning.tokenizers.known_tokenizers import bert_tokenizer, clip_tokenizer
from conditioning.tokenizers.tokenizer import Tokenizer, read_tokenizer
from stipple_core.files.weights import place

PADS = {"clip": END, "open_clip": "!"}  # what follows the end of a prompt in Stable Diffusion 1 and 2


def conditioner_from_compvis(
    weights: Mapping[str, Tensor], tokenizer: str | Path | None = None, dtype: torch.dtype | None = None
) -> AnyConditioner:
    """The conditioner of a single file.

    Args:
        weights: what follows `cond_stage_model.`; none give an Unconditional.
        tokenizer: a folder; None makes CLIP's (of open_clip's vocabulary) and that of layouts, and fetches
            bert-base-uncased for LDM's text transformer.
        dtype: of the weights in memory; None is float32, whatever the file holds.

    Raises:
        ValueError, FileNotFoundError: in one line: keys of no known kind, missing, left over or misshapen.
    """
    if not weights:
        return Unconditional()
    kind, dtype = kind_of_text(weights), dtype or torch.float32
    if kind == "class":
        return class_conditioner(text_from_compvis(weights)["embedding.weight"].to(dtype))
    config, named = text_config(weights), text_from_compvis(weights)
    encoder = empty_ldm_bert(config) if kind == "bert" else empty_clip(config)
    place(encoder, {name: weight.to(dtype) for name, weight in named.items()}, SOURCE)
    words = _tokenizer(kind, tokenizer, config["vocab_size"], config["max_position_embeddings"])
    return Conditioner(words, encoder, use_mask=False)


def conditioner_to_compvis(conditioner: AnyConditioner) -> dict[str, Tensor]:
    """The weights that follow `cond_stage_model.` in a single file; {} of an Unconditional.

    A CLIP with GELU is written as Stable Diffusion 2's open_clip tower, one with quick GELU as Stable Diffusion 1's.

    Raises:
        ValueError: a text encoder that CompVis' programs don't have.
    """
    if isinstance(conditioner, Unconditional):
        return {}
    if isinstance(conditioner, ClassConditioner):
        return text_to_compvis(conditioner.state_dict(), "class")
    encoder = conditioner.encoder
    if conditioner.use_mask or not isinstance(encoder, Clip | LdmBert):
        mask = " with a mask" if conditioner.use_mask else ""
        raise ValueError(f"a text encoder of type {encoder.config['model_type']}{mask} has no place in a single file")
    heads = encoder.config.get("num_attention_heads") or encoder.config["encoder_attention_heads"]
    width = encoder.config.get("hidden_size") or heads * encoder.config["head_dim"]
    if width != heads * HEAD_DIM:
        raise ValueError(f"heads of width {width // heads} have no place in a single file, whose are {HEAD_DIM} wide")
    if isinstance(encoder, LdmBert):
        return text_to_compvis(encoder.weights(), "bert")
    return text_to_compvis(encoder.weights(), "clip" if encoder.config["hidden_act"] == "quick_gelu" else "open_clip")


def _tokenizer(kind: str, source: str | Path | None, vocab_size: int, max_length: int) -> Tokenizer | LayoutTokenizer:
    """The tokenizer that a single file's program knows by name, or the user's."""
    if kind == "bert" and source is None and vocab_size == LAYOUTS:
        return LayoutTokenizer(vocab_size, max_length)
    if kind == "bert":
        return bert_tokenizer(source, max_length)
    if source is not None:
        return read_tokenizer(Path(source).expanduser(), max_length, max_length)
    if vocab_size != VOCAB_SIZE:
        raise ValueError(f"{SOURCE} knows {vocab_size} tokens, CLIP's vocabulary has {VOCAB_SIZE}; give a tokenizer")
    return clip_tokenizer(max_length, PADS[kind])
