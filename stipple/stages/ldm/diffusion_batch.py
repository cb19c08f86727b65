"""The tensors of a micro-batch of stage 2 that an objective computes losses from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from conditioning.interface.context import Context


@dataclass(frozen=True, kw_only=True)
class DiffusionBatch:
    """Latents, contexts, times and noise of B training images."""

    z_0: Tensor  # clean latents [B, c, h, w]
    context: Context  # of batch size B; the null context where the caption was dropped
    null: Context | None  # null contexts, of batch size B or 1; None if they are not needed, see `BatchEncoder`
    t: Tensor  # times [B], drawn from the time density
    noise: Tensor  # standard normal [B, c, h, w]
    draw: Callable[[str], Tensor]  # purpose -> uniform numbers [B], each from the address of its image
