"""Caption dropout: random contexts become the null context, for guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from torch import Tensor

from conditioning.interface.context import Context


def drop_context(context: Context, null: Context, drop: Tensor) -> Context:
    """Replace members by the null context (batch 1) where `drop` [B] bool is True.

    With it one network learns both the conditional and the unconditional score (Ho & Salimans 2022, algorithm 1).
    """
    return context.where(~drop, null)
