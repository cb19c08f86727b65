"""Token ids of prompts, and the interface of the tokenizers that produce them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids of B prompts, padded to one length."""

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool, False on padding


class PromptTokenizer(Protocol):
    """Converts prompts, which are text or layouts, to token ids of one fixed length."""

    max_length: int  # L of the ids
    has_positions: bool  # prompts describe where objects are, so images must not be flipped or cropped at random

    @property
    def options(self) -> dict[str, Any]:
        """Contents of tokenizer_config.json."""

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask [B, L] of B prompts; prompts that are too long are truncated."""

    def cut(self, prompt: str) -> str:
        """Return the end of the prompt that is truncated, or "" if the prompt fits."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""

    def fingerprint(self) -> bytes:
        """Return bytes that differ between tokenizers that may produce different ids."""

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary, which a training run stores with the weights."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
