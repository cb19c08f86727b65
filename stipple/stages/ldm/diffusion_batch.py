"""What a step of stage 2 learns from: pictures as latents, what is told of them, and what was drawn for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from conditioning.interface.context import Context


@dataclass(frozen=True, kw_only=True)
class DiffusionBatch:
    """B pictures of a step."""

    z_0: Tensor  # clean latents [B, c, h, w]
    context: Context  # what the model is told, of B; of some it may be the null context
    null: Context | None  # what it is told of nothing, of B or 1; None where nobody is, see `BatchEncoder`
    t: Tensor  # times [B], as the density draws them
    noise: Tensor  # standard normal [B, c, h, w]
    draw: Callable[[str], Tensor]  # (what for) -> uniform numbers [B], each from its picture's own address
