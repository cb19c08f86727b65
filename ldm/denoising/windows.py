"""Images larger than a network can process: overlapping windows, fused at every step (Bar-Tal et al. 2023).

"MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", arXiv:2302.08113, eq. 5: the estimate with the
smallest weighted squared distance to those of all windows is their weighted mean. The network is wrapped, so guidance
and samplers are not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.denoising.perturbed_context import PerturbedContext

EDGE = 0.25  # share of the overlap at the edge of a window that has weight 0, since context is missing there


@dataclass(frozen=True)
class Windowed:
    """A network of small latents, applied to large latents: (z_t, timestep, context) -> output.

    Args:
        network: (z_t, timestep, context) -> output [B, C, h, w], called with each window in turn.
        window: side of a window in latents; a shorter side of the latents has one window.
        overlap: smallest overlap of neighboring windows in latents; a quarter of it on either side has weight 0.

    Raises:
        ValueError: the window is below 2, or the overlap is not between 0 and half of it.
    """

    network: Callable[[Tensor, Tensor, Any], Tensor]
    window: int
    overlap: int

    def __post_init__(self) -> None:
        check_windows(self.window, self.overlap)

    def __call__(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """The output [B, C, H, W] for z_t [B, c, H, W] at timesteps [B]; the context's latents are cropped too."""
        height, width = z_t.shape[2:]
        rows, columns = self._starts(height), self._starts(width)
        if len(rows) == len(columns) == 1:
            return self.network(z_t, timestep, context)
        total = None
        for top, down in zip(rows, self._weights(rows, height), strict=True):
            for left, across in zip(columns, self._weights(columns, width), strict=True):
                place = (..., slice(top, top + len(down)), slice(left, left + len(across)))
                output = self.network(z_t[place], timestep, _cut(context, place))
                if total is None:
                    total = output.new_zeros(*output.shape[:2], height, width)
                total[place] += output * (down[:, None] * across).to(output)
        return total

    def _starts(self, length: int) -> list[int]:
        """Where windows begin along one side: the fewest windows, evenly spaced."""
        last, stride = max(0, length - self.window), self.window - self.overlap
        count = -(-last // stride)
        return [0, *(last * i // count for i in range(1, count + 1))]

    def _weights(self, starts: list[int], length: int) -> list[Tensor]:
        """Weights of each window along one side, [side] each; they add up to 1 at each place."""
        side, edge = min(self.window, length), int(EDGE * self.overlap)
        ramp = self.overlap - 2 * edge
        rise = (torch.arange(side, dtype=torch.float64) - edge + 0.5).clamp(0, max(ramp, 1)) / max(ramp, 1)
        rise = (rise * torch.pi / 2).sin().square()  # 0 at the edge, 1 beyond the overlap
        weights = []
        for start in starts:
            weight = torch.ones(side, dtype=torch.float64)
            if start > 0:
                weight = weight * rise
            if start + side < length:
                weight = weight * rise.flip(0)
            weights.append(weight)
        total = torch.zeros(length, dtype=torch.float64)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + side] += weight
        return [weight / total[start : start + side] for start, weight in zip(starts, weights, strict=True)]


def check_windows(window: int, overlap: int) -> None:
    """Raise ValueError for invalid windows."""
    if window < 2:
        raise ValueError(f"window {window} must be at least 2 latents; as many as the model was trained on is usual")
    if not 0 <= overlap <= window // 2:
        raise ValueError(f"overlap {overlap} must be between 0 and half of the window, {window // 2}, which is usual")


def _cut(context: Any, place: tuple) -> Any:
    """The context of one window: all tokens and the vector, and its part of the latents."""
    if isinstance(context, PerturbedContext):
        return replace(context, context=_cut(context.context, place))
    if context is None or context.latents is None:
        return context
    return replace(context, latents=context.latents[place])
