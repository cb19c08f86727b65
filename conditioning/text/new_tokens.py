"""Textual inversion: embeddings of new words for a frozen text encoder (Gal et al. 2022).

A word is one token or several consecutive ones, named as in diffusers: <toy>, <toy>_1, <toy>_2, ...
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.interface.conditioner import Conditioner
from conditioning.text.text_conditioner import TextConditioner
from conditioning.tokenizers.tokenizer import Tokenizer
from stipple_core.files.weights import read_weights, write_weights

FILE = "learned_embeds.safetensors"  # file that diffusers' load_textual_inversion reads


class GrownTable(nn.Module):
    """A frozen embedding table [V, d], extended by trainable rows [n, d] for the ids `first` to `first` + n - 1."""

    def __init__(self, table: nn.Module, rows: Tensor, first: int):
        super().__init__()
        self.table, self.first = table, first
        self.rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """The frozen table; callers use it for the device and dtype of the encoder."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        index = (ids - self.first).clamp(0, len(self.rows) - 1)
        new = ids == index + self.first
        old = self.table(torch.where(new, 0, ids))  # [B, L] -> [B, L, d]
        return torch.where(new[..., None], F.embedding(index, self.rows), old)


def new_token(conditioner: TextConditioner, token: str, rows: Tensor) -> GrownTable:
    """Add a word with embeddings [n, d] to a conditioner; contexts of prompts without the word keep every bit.

    Raises:
        ValueError: The word exists already or is not a single word, or the embeddings have the wrong width.
    """
    table = token_table(conditioner)
    width = table.embedding_dim
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{token} has embeddings of width {rows.shape[-1]}; this text encoder requires {width}")
    first = conditioner.tokenizer.add(token, len(rows))
    extended = GrownTable(table, rows.detach().to(table.weight).clone(), first)
    for module in list(conditioner.encoder.modules()):
        for name, child in list(module.named_children()):
            if child is table:
                setattr(module, name, extended)
    return extended


def token_table(conditioner: Conditioner) -> nn.Embedding:
    """Return the token embeddings [V, d] of the only text encoder: its largest table. Raises ValueError."""
    if not isinstance(conditioner.tokenizer, Tokenizer):
        raise ValueError("a new word requires a model with exactly one text encoder; use another model")
    tables = (module for module in conditioner.encoder.modules() if isinstance(module, nn.Embedding))
    return max(tables, key=lambda table: table.num_embeddings)


def initial_rows(conditioner: TextConditioner, text: str, count: int) -> Tensor:
    """Return embeddings [count, d] of the tokens of a text, repeated as often as needed, to start training from.

    Raises:
        ValueError: The text has no tokens, or more than `count`.
    """
    weight, ids = token_table(conditioner).weight, conditioner.tokenizer.ids(text)
    if not 1 <= len(ids) <= count:
        fix = "use a word with one token" if ids else "use a word"
        raise ValueError(f"initial {text!r} has {len(ids)} tokens, but {count} are trained; {fix}")
    chosen = torch.tensor([ids[i % len(ids)] for i in range(count)])
    return weight[chosen.to(weight.device)].detach().clone()


def save_embedding(token: str, rows: Tensor, folder: str | os.PathLike) -> None:
    """Write the embeddings [n, d] of a word in diffusers' format, which stores a single one as [d]."""
    write_weights({token: rows[0] if len(rows) == 1 else rows}, Path(folder) / FILE)


def read_embedding(path: str | os.PathLike) -> tuple[str, Tensor]:
    """Read a word and its embeddings [n, d] from a file, or from the folder of a training run.

    Raises:
        FileNotFoundError, ValueError: In one line, if the file is missing, damaged or not an embedding.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    weights = read_weights(path)
    (token, rows), *others = weights.items() if weights else [("", torch.empty(0))]
    if others or rows.ndim not in (1, 2) or not rows.numel() or not rows.isfinite().all():
        raise ValueError(f"{path} is not the embedding of one word; use a {FILE}")
    return token, rows if rows.ndim == 2 else rows[None]
