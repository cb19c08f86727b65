"""Layouts as prompts (Rombach et al. 2022, section 4.3.1): boxes with classes, in the format of LDM's layout model.

An object is three ids: its class, and the grid cells that contain the top-left and bottom-right corners of its box.
Empty places have the last id of the vocabulary. The two ids at the end are the box of the crop, which is always the
whole picture. The encoder is trained together with the UNet: LDM's BERT, or `conditioning.encoders.boxes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from conditioning.classes.class_names import ClassNames, check_names
from conditioning.encoders.boxes import BoxEncoder, random_boxes
from conditioning.encoders.ldm_bert import LdmBert, random_ldm_bert
from conditioning.interface.tokens import Tokens
from stipple_core.files.json_file import read_json

TOKENIZER_CLASS = "LayoutTokenizer"  # Stipple's own, in tokenizer/tokenizer_config.json
VOCAB_SIZE = 8192  # of LDM's layout model
HIDDEN_LAYERS = 2  # of the perceptron of `reader: waves`; GLIGEN's
RULE = 'an object is "CLASS LEFT TOP RIGHT BOTTOM", with four numbers from 0 to 1; separate objects by ";"'


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Options of the encoder of layouts, which is trained from scratch; the defaults are LDM's (58.9 M parameters).

    Raises:
        ValueError: An option is invalid.
    """

    names: list[str] = field(default_factory=list)  # class names; empty: those in the captions, sorted
    vocab_size: int = VOCAB_SIZE  # number of ids, of classes and of grid cells: 8192 for a grid of 90 x 90
    max_objects: int = 30  # further objects of a layout are ignored
    width: int = 512  # d of the tokens
    reader: str = "cells"  # cells: LDM's transformer, an embedding per cell | waves: Fourier features, as in GLIGEN
    layers: int = 16  # cells only: residual blocks
    heads: int = 8  # cells only: attention heads per block

    def __post_init__(self):
        check_names(self.names)
        if self.reader not in LAYOUT_READERS:
            raise ValueError(f"layout.reader {self.reader!r} is unknown; use one of {', '.join(LAYOUT_READERS)}")
        for name in ("layers", "heads") if self.reader == "waves" else ():
            if getattr(self, name) != getattr(LayoutConfig, name):
                raise ValueError(f"layout.{name} {getattr(self, name)} requires layout.reader cells; remove it")
        if self.reader == "cells" and self.width % self.heads:
            raise ValueError(f"layout.width {self.width} is not divisible by {self.heads} heads; change one of the two")
        if self.vocab_size < len(self.names) + 1 or self.vocab_size < 5:
            least = max(len(self.names) + 1, 5)
            raise ValueError(f"layout.vocab_size {self.vocab_size} is too small for the classes; use {least} or more")
        if math.isqrt(self.vocab_size) ** 2 == self.vocab_size:
            raise ValueError(
                f"layout.vocab_size {self.vocab_size} is a square, so the grid cells leave no id for empty places; "
                f"use {self.vocab_size + 1}"
            )
        if self.max_objects < 1:
            raise ValueError(f"layout.max_objects {self.max_objects} must be at least 1")


class LayoutTokenizer:
    """Converts layouts such as "17 0.1 0.2 0.5 0.9; 3 0 0 1 0.4" to ids of one length; "" is the empty layout.

    Args:
        vocab_size: Number of ids of the encoder; the grid is the largest square with at most this many cells.
        max_length: 3 tokens per object and 2 for the crop.
        names: Class names that prompts may use instead of numbers; if present, there are no other classes.
    """

    has_positions = True

    def __init__(self, vocab_size: int, max_length: int, names: Sequence[str] = ()) -> None:
        if max_length % 3 != 2:
            raise ValueError(
                f"max_length {max_length} must be 3 tokens per object and 2 more, so this is not a layout model"
            )
        self.vocab_size, self.max_length, self.classes = vocab_size, max_length, ClassNames(names)
        self.side = math.isqrt(vocab_size)

    @property
    def options(self) -> dict[str, object]:
        """Contents of tokenizer_config.json."""
        options = {"vocab_size": self.vocab_size, "model_max_length": self.max_length}
        return {"tokenizer_class": TOKENIZER_CLASS, **options, "class_names": self.classes.names}

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask (all True) [B, max_length] of B layouts; objects that do not fit are ignored.

        Raises:
            ValueError: An object is invalid; the message explains the format.
        """
        ids = torch.tensor([self._encode(prompt) for prompt in prompts], dtype=torch.long).reshape(-1, self.max_length)
        return Tokens(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))

    def cut(self, prompt: str) -> str:
        """Return the objects that exceed max_length tokens, or "" if all fit."""
        return "; ".join(_objects(prompt)[self.max_length // 3 :])

    def save(self, folder: Path) -> None:
        """Write tokenizer_config.json into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(self.options, indent=2) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, list[str]]:
        """Return the class names, which a training run stores with the weights."""
        return self.classes.state_dict()

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Restore a `state_dict`."""
        self.classes.load_state_dict(state)

    def fingerprint(self) -> bytes:
        """Return bytes that differ between tokenizers that may produce different ids."""
        return json.dumps(self.options).encode()

    def _encode(self, prompt: str) -> list[int]:
        ids = []
        for text in _objects(prompt)[: self.max_length // 3]:
            name, (left, top, right, bottom) = _parts(text)
            number = self.classes.row(name)
            count = len(self.classes.names) or self.vocab_size - 1
            if number is None or number >= count:
                near = f"; {self.classes.near(name)}" if self.classes.names else ""
                raise ValueError(f"{text!r:.80} is not an object of a layout: {RULE}{near}")
            if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
                rule = "0 <= left <= right <= 1 and 0 <= top <= bottom <= 1 must hold"
                raise ValueError(f"{text!r:.80} is not an object of a layout: {rule}; {RULE}")
            ids += [number, self._cell(left, top), self._cell(right, bottom)]
        empty = [self.vocab_size - 1] * (self.max_length - 2 - len(ids))
        return [*ids, *empty, self._cell(0, 0), self._cell(1, 1)]

    def _cell(self, x: float, y: float) -> int:
        """Return the number of the cell at x, y (0 to 1), counted along rows."""
        return round(y * (self.side - 1)) * self.side + round(x * (self.side - 1))


def new_layouts(config: LayoutConfig, captions: Iterable[str] | None, seed: int) -> tuple[LayoutTokenizer, nn.Module]:
    """Return a tokenizer of layouts, and a new encoder of its ids with weights drawn from the seed.

    Args:
        captions: Captions of the training set, each of them a layout; they name the classes if the config does not.

    Raises:
        ValueError: A caption is not a layout.
    """
    captions = list(captions or [])
    names = config.names or sorted({_parts(text)[0].lower() for caption in captions for text in _objects(caption)})
    names = replace(config, names=[] if all(name.isdecimal() for name in names) else names).names
    tokenizer = LayoutTokenizer(config.vocab_size, 3 * config.max_objects + 2, names)
    tokenizer(captions)  # raises for a caption that is not a layout
    return tokenizer, LAYOUT_READERS[config.reader](config, tokenizer, seed)


def _cells(config: LayoutConfig, tokenizer: LayoutTokenizer, seed: int) -> LdmBert:
    sizes = {
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "max_position_embeddings": tokenizer.max_length,
        "encoder_layers": config.layers,
        "encoder_ffn_dim": 4 * config.width,
        "encoder_attention_heads": config.heads,
        "head_dim": config.width // config.heads,
    }
    return random_ldm_bert(sizes, seed)


def _waves(config: LayoutConfig, tokenizer: LayoutTokenizer, seed: int) -> BoxEncoder:
    return random_boxes(config.vocab_size, config.width, HIDDEN_LAYERS, seed)


LAYOUT_READERS = {"cells": _cells, "waves": _waves}


def read_layout_tokenizer(folder: Path) -> LayoutTokenizer | None:
    """Load a tokenizer that `LayoutTokenizer.save` wrote; None if the folder has another tokenizer."""
    try:
        options = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return None  # `read_tokenizer` raises
    if options.get("tokenizer_class") != TOKENIZER_CLASS:
        return None
    return LayoutTokenizer(options["vocab_size"], options["model_max_length"], options.get("class_names", ()))


def _objects(prompt: str) -> list[str]:
    return [text.strip() for text in prompt.split(";") if text.strip()]


def _parts(text: str) -> tuple[str, list[float]]:
    """Return class and box of an object; a class may have several words."""
    try:
        name, *box = text.rsplit(maxsplit=4)
        left, top, right, bottom = (float(edge) for edge in box)
    except ValueError:
        raise ValueError(f"{text!r:.80} is not an object of a layout: {RULE}") from None
    return name, [left, top, right, bottom]
