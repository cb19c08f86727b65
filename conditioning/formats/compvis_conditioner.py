"""Conversion of conditioners from and to the single-file checkpoints of CompVis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from conditioning.classes.class_conditioner import ClassConditioner, Unconditional, class_conditioner
from conditioning.encoders.clip import Clip, empty_clip
from conditioning.encoders.ldm_bert import LdmBert, empty_ldm_bert
from conditioning.encoders.open_clip_names import HEAD_DIM
from conditioning.formats.compvis_text import (
    SOURCE,
    kind_of_text,
    text_config,
    text_from_compvis,
    text_to_compvis,
)
from conditioning.interface.conditioner import Conditioner
from conditioning.layouts.layout_tokenizer import VOCAB_SIZE as LAYOUTS
from conditioning.layouts.layout_tokenizer import LayoutTokenizer
from conditioning.text.text_conditioner import TextConditioner
from conditioning.tokenizers.clip_bpe import END, VOCAB_SIZE
from conditioning.tokenizers.known_tokenizers import bert_tokenizer, clip_tokenizer
from conditioning.tokenizers.tokenizer import Tokenizer, read_tokenizer
from stipple_core.files.weights import place

PADS = {"clip": END, "open_clip": "!"}  # padding token of Stable Diffusion 1 and 2


def conditioner_from_compvis(
    weights: Mapping[str, Tensor], tokenizer: str | Path | None = None, dtype: torch.dtype | None = None
) -> Conditioner:
    """Return the conditioner of a single-file checkpoint.

    Args:
        weights: Weights without the prefix `cond_stage_model.`; an empty mapping results in `Unconditional`.
        tokenizer: Folder of a tokenizer. None uses CLIP's tokenizer (with open_clip's vocabulary) or that of layouts,
            and downloads bert-base-uncased for LDM's text transformer.
        dtype: Dtype of the weights in memory; None is float32, independent of the file.

    Raises:
        ValueError, FileNotFoundError: In one line, if keys are missing or unknown, or shapes are wrong.
    """
    if not weights:
        return Unconditional()
    kind, dtype = kind_of_text(weights), dtype or torch.float32
    if kind == "class":
        return class_conditioner(text_from_compvis(weights)["embedding.weight"].to(dtype))
    config, converted = text_config(weights), text_from_compvis(weights)
    encoder = empty_ldm_bert(config) if kind == "bert" else empty_clip(config)
    place(encoder, {name: weight.to(dtype) for name, weight in converted.items()}, SOURCE)
    prompts = _tokenizer(kind, tokenizer, config["vocab_size"], config["max_position_embeddings"])
    return TextConditioner(prompts, encoder, use_mask=False)


def conditioner_to_compvis(conditioner: Conditioner) -> dict[str, Tensor]:
    """Return the weights of a conditioner for a single file, without `cond_stage_model.`; {} for `Unconditional`.

    A CLIP with GELU is written as the open_clip tower of Stable Diffusion 2, one with quick GELU as the CLIP of Stable
    Diffusion 1.

    Raises:
        ValueError: CompVis' programs do not support the text encoder.
    """
    if isinstance(conditioner, Unconditional):
        return {}
    if isinstance(conditioner, ClassConditioner):
        return text_to_compvis(conditioner.state_dict(), "class")
    encoder = conditioner.encoder
    if conditioner.use_mask or not isinstance(encoder, Clip | LdmBert):
        mask = " with a mask" if conditioner.use_mask else ""
        raise ValueError(f"a single file can't hold a text encoder of type {encoder.config['model_type']}{mask}")
    heads = encoder.config.get("num_attention_heads") or encoder.config["encoder_attention_heads"]
    width = encoder.config.get("hidden_size") or heads * encoder.config["head_dim"]
    if width != heads * HEAD_DIM:
        raise ValueError(f"a single file can't hold heads of width {width // heads}; their width must be {HEAD_DIM}")
    if isinstance(encoder, LdmBert):
        return text_to_compvis(encoder.weights(), "bert")
    return text_to_compvis(encoder.weights(), "clip" if encoder.config["hidden_act"] == "quick_gelu" else "open_clip")


def _tokenizer(kind: str, source: str | Path | None, vocab_size: int, max_length: int) -> Tokenizer | LayoutTokenizer:
    """Return the tokenizer in a folder, or the one that CompVis' program uses."""
    if kind == "bert" and source is None and vocab_size == LAYOUTS:
        return LayoutTokenizer(vocab_size, max_length)
    if kind == "bert":
        return bert_tokenizer(source, max_length)
    if source is not None:
        return read_tokenizer(Path(source).expanduser(), max_length, max_length)
    if vocab_size != VOCAB_SIZE:
        raise ValueError(f"{SOURCE} has {vocab_size} tokens, CLIP's vocabulary {VOCAB_SIZE}; pass a tokenizer")
    return clip_tokenizer(max_length, PADS[kind])
