"""Layers over rows, applied to blocks of rows whose intermediate values fit a CPU's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CACHED_VALUES = 3_000_000  # intermediate values computed at a time on a CPU: 12 MB in float32
FEWEST_ROWS = 512  # matrix products of fewer rows are slow


def map_rows(layer: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """Apply a layer to the rows of x [B, N, dim]; on a CPU without gradients, in blocks of rows.

    Args:
        layer: [..., dim] -> [..., dim], each row by itself.
        x: [B, N, dim].
        width: intermediate values per row.
    """
    if torch.is_grad_enabled() or not x.is_cpu:
        return layer(x)
    rows = max(FEWEST_ROWS, CACHED_VALUES // width)
    return torch.cat([layer(part) for part in x.flatten(0, 1).split(rows)]).view_as(x)
