"""Layouts as prompts (Rombach et al. 2022, section 4.3.1): boxes with class numbers, as LDM's layout model reads them.

An object is three ids: its class, and the cells of a grid in which two corners of its box lie. Room that no object
takes is filled with the last id; the two at the end are the box of the crop, here always the whole picture. What reads
them is trained with the UNet: LDM's BERT, or the perceptron of `conditioning.encoders.boxes`.
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
from conditioning.tokenizers.tokenizer import Tokens

TOKENIZER_CLASS = "LayoutTokenizer"  # our mark in tokenizer/tokenizer_config.json
VOCAB_SIZE = 8192  # of LDM's layout model
HIDDEN_LAYERS = 2  # of the perceptron of waves; GLIGEN's
RULE = 'an object is "CLASS LEFT TOP RIGHT BOTTOM", a class and four numbers from 0 to 1; objects are parted by ";"'


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """What reads boxes, trained from scratch; the defaults are LDM's transformer (58.9 M parameters).

    Raises:
        ValueError: a value breaks a rule; the message names value, rule and mend.
    """

    names: list[str] = field(default_factory=list)  # of the classes; empty: those of the captions, sorted
    vocab_size: int = VOCAB_SIZE  # rows of the table; the cells are the largest square below: 8192 for 90 x 90
    max_objects: int = 30  # what a layout has more is left out
    width: int = 512  # d of the tokens
    reader: str = "cells"  # cells: LDM's transformer, a vector per cell | waves: sines of coordinates, as in GLIGEN
    layers: int = 16  # cells only: residual blocks
    heads: int = 8  # cells only: attention heads per block

    def __post_init__(self):
        check_names(self.names)
        if self.reader not in LAYOUT_READERS:
            raise ValueError(f"layout.reader {self.reader!r} is unknown; use one of {', '.join(LAYOUT_READERS)}")
        for name in ("layers", "heads") if self.reader == "waves" else ():
            if getattr(self, name) != getattr(LayoutConfig, name):
                raise ValueError(f"layout.{name} {getattr(self, name)} is of the reader cells; leave it out")
        if self.reader == "cells" and self.width % self.heads:
            raise ValueError(f"layout.width {self.width} is not divisible by {self.heads} heads; change one of them")
        if self.vocab_size < len(self.names) + 1 or self.vocab_size < 5:
            least = max(len(self.names) + 1, 5)
            raise ValueError(f"layout.vocab_size {self.vocab_size} can't hold classes and cells; use {least} or more")
        if math.isqrt(self.vocab_size) ** 2 == self.vocab_size:
            said = f"layout.vocab_size {self.vocab_size} leaves, beside its cells, no token for no object"
            raise ValueError(f"{said}; use {self.vocab_size + 1}")
        if self.max_objects < 1:
            raise ValueError(f"layout.max_objects {self.max_objects} must be at least 1")


class LayoutTokenizer:
    """Prompts such as "17 0.1 0.2 0.5 0.9; 3 0 0 1 0.4" to ids of one length; "" is the empty layout.

    Args:
        vocab_size: of the encoder; the grid has as many cells as fit into it, in as many rows as columns.
        max_length: 3 tokens per object and 2 for the crop.
        names: of the classes, which prompts may use in place of their numbers; there are no others then.
    """

    def __init__(self, vocab_size: int, max_length: int, names: Sequence[str] = ()) -> None:
        if max_length % 3 != 2:
            raise ValueError(f"max_length {max_length} of a layout is not 3 tokens per object and 2 more; is this one?")
        self.vocab_size, self.max_length, self.classes = vocab_size, max_length, ClassNames(names)
        self.side = math.isqrt(vocab_size)

    @property
    def options(self) -> dict[str, object]:
        """What tokenizer_config.json says."""
        options = {"vocab_size": self.vocab_size, "model_max_length": self.max_length}
        return {"tokenizer_class": TOKENIZER_CLASS, **options, "class_names": self.classes.names}

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask (all true) [B, max_length] of B layouts; objects that do not fit are left out.

        Raises:
            ValueError: naming the object that is none, and how one is written.
        """
        ids = torch.tensor([self._encode(prompt) for prompt in prompts], dtype=torch.long).reshape(-1, self.max_length)
        return Tokens(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))

    def cut(self, prompt: str) -> str:
        """The objects that do not fit into max_length tokens; "" where all do."""
        return "; ".join(_objects(prompt)[self.max_length // 3 :])

    def save(self, folder: Path) -> None:
        """Writes tokenizer_config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(self.options, indent=2) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, list[str]]:
        """The names of the classes: with trained weights goes what their ids meant."""
        return self.classes.state_dict()

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Take back a `state_dict`."""
        self.classes.load_state_dict(state)

    def fingerprint(self) -> bytes:
        """Bytes that differ when ids could."""
        return json.dumps(self.options).encode()

    def _encode(self, prompt: str) -> list[int]:
        ids = []
        for text in _objects(prompt)[: self.max_length // 3]:
            name, (left, top, right, bottom) = _parts(text)
            number = self.classes.row(name)
            known = len(self.classes.names) or self.vocab_size - 1
            if number is None or number >= known:
                near = f"; {self.classes.near(name)}" if self.classes.names else ""
                raise ValueError(f"{text!r:.80} is no object of a layout: {RULE}{near}")
            if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
                rule = "left may not be beyond right, nor top below bottom, nor any of them out of 0 to 1"
                raise ValueError(f"{text!r:.80} is no object of a layout: {rule}; {RULE}")
            ids += [number, self._cell(left, top), self._cell(right, bottom)]
        empty = [self.vocab_size - 1] * (self.max_length - 2 - len(ids))
        return [*ids, *empty, self._cell(0, 0), self._cell(1, 1)]

    def _cell(self, x: float, y: float) -> int:
        """The number of the cell at x, y from 0 to 1, counted along rows."""
        return round(y * (self.side - 1)) * self.side + round(x * (self.side - 1))


def new_layouts(config: LayoutConfig, captions: Iterable[str] | None, seed: int) -> tuple[LayoutTokenizer, nn.Module]:
    """A tokenizer of layouts, and what reads its ids, with weights drawn from the seed.

    Args:
        captions: of the training set, each a layout; they give the names where the config does not.

    Raises:
        ValueError: a caption is no layout.
    """
    captions = list(captions or [])
    names = config.names or sorted({_parts(text)[0].lower() for caption in captions for text in _objects(caption)})
    names = replace(config, names=[] if all(name.isdecimal() for name in names) else names).names
    tokenizer = LayoutTokenizer(config.vocab_size, 3 * config.max_objects + 2, names)
    tokenizer(captions)  # a caption that is no layout is to be found now
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
    """What `LayoutTokenizer.save` wrote into a folder; None where another tokenizer is."""
    try:
        options = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # for the reader of the other tokenizers to judge
    if not isinstance(options, dict) or options.get("tokenizer_class") != TOKENIZER_CLASS:
        return None
    return LayoutTokenizer(options["vocab_size"], options["model_max_length"], options.get("class_names", ()))


def _objects(prompt: str) -> list[str]:
    return [text.strip() for text in prompt.split(";") if text.strip()]


def _parts(text: str) -> tuple[str, list[float]]:
    """Class and box of an object; a class may be of several words."""
    try:
        name, *box = text.rsplit(maxsplit=4)
        left, top, right, bottom = (float(edge) for edge in box)
    except ValueError:
        raise ValueError(f"{text!r:.80} is no object of a layout: {RULE}") from None
    return name, [left, top, right, bottom]
