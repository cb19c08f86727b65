"""Interface of readers: each one turns one kind of input besides the prompts into a part of a `Context`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What a reader contributes to the inputs of a UNet; 0 means none."""

    tokens: int = 0  # d of its tokens [B, L, d], which must equal that of the prompts' tokens
    vector: int = 0  # v of its vector [B, v], which is concatenated to those of other readers
    latents: int = 0  # c of its latents [B, c, h, w], which are concatenated to those of other readers


class Reader(Protocol):
    """An `nn.Module` that maps `ConditionInputs` to a `Context`; inherit `InputReader` for the defaults."""

    Config: ClassVar[type]  # frozen dataclass of the reader's options, a section of `ConditionerConfig`
    config: Any  # instance of Config, which is stored as JSON beside the weights
    widths: Widths
    reads: frozenset[str]  # fields of ConditionInputs; "map" in addition if training needs maps to make the hints
    optional: frozenset[str]  # subset of `reads` that has a substitute when a picture is drawn
    reads_prompts: bool  # reads the prompts too
    trainable: bool  # is trained together with the UNet
    survives_dropout: bool  # the context is the same for members that caption dropout selects

    def __call__(self, inputs: ConditionInputs) -> Context:
        """Return the context of B members; for members with `inputs.is_dropped`, the null context."""

    def bind_encoder(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Set the function images [B, 3, H, W] -> latents [B, c, h, w]."""

    def open_files(self) -> list[Path]:
        """Open the data files of the reader and return their paths; raises FileNotFoundError or ValueError."""


class InputReader(nn.Module):
    """Base class of readers: the defaults of `Reader`.

    Subclasses define `Config`, `reads`, `forward`, and in `__init__` set `config` and `widths`.
    """

    optional: frozenset[str] = frozenset()
    reads_prompts = trainable = survives_dropout = False

    def bind_encoder(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Do nothing: most readers need no latents."""

    def open_files(self) -> list[Path]:
        """Return []: most readers have no data files."""
        return []
