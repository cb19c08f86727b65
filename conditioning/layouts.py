"""Layouts as prompts (Rombach et al. 2022, section 4.3.1): boxes with class numbers, as LDM's layout model reads them.

An object is three tokens: its class, and the cells of a grid in which two corners of its box lie. Room that no object
takes is filled with the last token; the two tokens at the end are the box of the crop, here always the whole picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from conditioning.tokenizer import Tokens

TOKENIZER_CLASS = "LayoutTokenizer"  # our mark in tokenizer/tokenizer_config.json
VOCAB_SIZE = 8192  # of LDM's layout model
RULE = 'an object is "CLASS LEFT TOP RIGHT BOTTOM", a whole number and four from 0 to 1, objects are parted by ";"'


class LayoutTokenizer:
    """Prompts such as "17 0.1 0.2 0.5 0.9; 3 0 0 1 0.4" to ids of one length; "" is the empty layout.

    Args:
        vocab_size: of the encoder; the grid has as many cells as fit into it, in as many rows as columns.
        max_length: 3 tokens per object and 2 for the crop.
    """

    def __init__(self, vocab_size: int, max_length: int) -> None:
        if max_length % 3 != 2:
            raise ValueError(f"max_length {max_length} of a layout is not 3 tokens per object and 2 more; is this one?")
        self.vocab_size, self.max_length = vocab_size, max_length
        self.side = math.isqrt(vocab_size)
        self.options = {"tokenizer_class": TOKENIZER_CLASS, "vocab_size": vocab_size, "model_max_length": max_length}

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask (all true) [B, max_length] of B layouts; objects that do not fit are left out.

        Raises:
            ValueError: naming the object that is none, and how one is written.
        """
        ids = torch.tensor([self._encode(prompt) for prompt in prompts], dtype=torch.long).reshape(-1, self.max_length)
        return Tokens(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))

    def cut(self, prompt: str) -> str:
        """The objects that do not fit into max_length tokens; "" where all do."""
        return "; ".join(self._objects(prompt)[self.max_length // 3 :])

    def save(self, folder: Path) -> None:
        """Writes tokenizer_config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer_config.json").write_text(json.dumps(self.options, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> bytes:
        """Bytes that differ when ids could."""
        return json.dumps(self.options).encode()

    def _encode(self, prompt: str) -> list[int]:
        ids = []
        for text in self._objects(prompt)[: self.max_length // 3]:
            try:
                number, *box = text.split()
                number, (left, top, right, bottom) = int(number), (float(edge) for edge in box)
            except ValueError:
                raise ValueError(f"{text!r:.80} is no object of a layout: {RULE}") from None
            if not (0 <= number < self.vocab_size - 1 and 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
                raise ValueError(f"{text!r:.80} is no object of a layout: a class or an edge is out of range; {RULE}")
            ids += [number, self._cell(left, top), self._cell(right, bottom)]
        empty = [self.vocab_size - 1] * (self.max_length - 2 - len(ids))
        return [*ids, *empty, self._cell(0, 0), self._cell(1, 1)]

    def _cell(self, x: float, y: float) -> int:
        """The number of the cell at x, y from 0 to 1, counted along rows."""
        return round(y * (self.side - 1)) * self.side + round(x * (self.side - 1))

    def _objects(self, prompt: str) -> list[str]:
        return [text.strip() for text in prompt.split(";") if text.strip()]


def read_layout_tokenizer(folder: Path) -> LayoutTokenizer | None:
    """What `LayoutTokenizer.save` wrote into a folder; None where another tokenizer is."""
    try:
        options = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # for the reader of the other tokenizers to judge
    if not isinstance(options, dict) or options.get("tokenizer_class") != TOKENIZER_CLASS:
        return None
    return LayoutTokenizer(options["vocab_size"], options["model_max_length"])
