"""Words that a text encoder learns when all else of it stays (Gal et al. 2022, textual inversion).

A word is one token or several in a row, as diffusers names them: <toy>, <toy>_1, <toy>_2, ...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.tokenizers.tokenizer import Tokenizer
from stipple_core.files.weights import read_weights, write_weights

if TYPE_CHECKING:
    from conditioning.text.text_conditioner import Conditioner

FILE = "learned_embeds.safetensors"  # where diffusers' load_textual_inversion looks in a folder


class GrownTable(nn.Module):
    """A table of embeddings [V, d] that stays, and rows [n, d] for n further ids, which may learn."""

    def __init__(self, table: nn.Module, rows: Tensor, first: int):
        super().__init__()
        self.table, self.first = table, first
        self.rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """The table without the rows: what says on which device and in which dtype the encoder is."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        index = (ids - self.first).clamp(0, len(self.rows) - 1)
        new = ids == index + self.first
        known = self.table(torch.where(new, 0, ids))  # [B, L] -> [B, L, d]
        return torch.where(new[..., None], F.embedding(index, self.rows), known)


def new_token(conditioner: Conditioner, token: str, rows: Tensor) -> GrownTable:
    """Teach a conditioner a word whose embeddings are rows [n, d]; prompts without it are read as before, bit for bit.

    Raises:
        ValueError: the word is known, is no single word, or the rows are of another width.
    """
    table = token_table(conditioner)
    width = table.embedding_dim
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{token} has embeddings of width {rows.shape[-1]}, this text encoder's have {width}")
    first = conditioner.tokenizer.add(token, len(rows))
    grown = GrownTable(table, rows.detach().to(table.weight).clone(), first)
    for module in list(conditioner.encoder.modules()):
        for name, child in list(module.named_children()):
            if child is table:
                setattr(module, name, grown)
    return grown


def token_table(conditioner: nn.Module) -> nn.Embedding:
    """The embeddings [V, d] of a vocabulary: an encoder's largest table. Raises ValueError for what reads no words."""
    if not isinstance(conditioner.tokenizer, Tokenizer):
        raise ValueError("a new word is for models with one text encoder, and this one has none, or two; give another")
    tables = (module for module in conditioner.encoder.modules() if isinstance(module, nn.Embedding))
    return max(tables, key=lambda table: table.num_embeddings)


def initial_rows(conditioner: Conditioner, text: str, count: int) -> Tensor:
    """The embeddings of a word that is known, [count, d]: its tokens in turn, again and again.

    Raises:
        ValueError: there are no tokens in it, or more than `count`.
    """
    weight, ids = token_table(conditioner).weight, conditioner.tokenizer.ids(text)
    if not 1 <= len(ids) <= count:
        mend = "use a word of one token" if ids else "give a word"
        raise ValueError(f"initial {text!r} has {len(ids)} tokens, and there are {count} to be learned; {mend}")
    chosen = torch.tensor([ids[i % len(ids)] for i in range(count)])
    return weight[chosen.to(weight.device)].detach().clone()


def save_embedding(token: str, rows: Tensor, folder: str | os.PathLike) -> None:
    """Write a word's embeddings [n, d] as diffusers reads them: [d] where there is one."""
    write_weights({token: rows[0] if len(rows) == 1 else rows}, Path(folder) / FILE)


def read_embedding(path: str | os.PathLike) -> tuple[str, Tensor]:
    """A word and its embeddings [n, d], from a file or the folder that training leaves.

    Raises:
        FileNotFoundError, ValueError: in one line: not there, damaged, or it holds something else.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    weights = read_weights(path)
    (token, rows), *others = weights.items() if weights else [("", torch.empty(0))]
    if others or rows.ndim not in (1, 2) or not rows.numel() or not rows.isfinite().all():
        raise ValueError(f"{path} holds no embedding of one word; give a learned_embeds.safetensors")
    return token, rows if rows.ndim == 2 else rows[None]
