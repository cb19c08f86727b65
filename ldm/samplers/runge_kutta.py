"""An adaptive solver of ordinary differential equations, the Runge-Kutta pair 5(4) of Dormand & Prince 1980."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Dormand & Prince 1980, table 2 (RK5(4)7M): the place of each slope, as a share of the step, and the weights of the
# slopes before it. The last one is the step itself: its slope is the first of the next step.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
WEIGHTS = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# The difference of the steps of order 5 and 4 estimates the error of the latter.
DIFFERENCES = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0  # of the step length; limits of one change (Hairer et al. 1993, II.4)


def adaptive(
    slope: Callable[[float, Tensor], Tensor], y: Tensor, start: float, stop: float, tolerance: float
) -> Iterator[tuple[float, Tensor]]:
    """Solve dy/dx = slope(x, y) from `start` to `stop`, which may be lower, with adaptive steps within a tolerance.

    The error that a step adds, divided by 1 + |y|, is at most `tolerance`. It is the root mean square over each row of
    y, and the worst row decides. Each step calls `slope` 6 times, the first one 7 times; the last call before a yield
    is the slope at the yielded point. Each step synchronizes with the device once, to read the error.

    Args:
        slope: (x, y) -> dy/dx, like y.
        y: [B, ...] at `start`.
        start, stop: the range of x.
        tolerance: relative and absolute.

    Yields:
        x and y at the end of each accepted step; the last x is `stop`. Nothing if start equals stop.

    Raises:
        ValueError: the tolerance is not a positive number, or no step is short enough for it.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance {tolerance} must be a positive number; 1e-5 is usual")
    x, step = start, (stop - start) * min(1.0, tolerance**0.2)
    slopes = [slope(x, y)] if start != stop else []
    while x != stop:
        if abs(stop - x) <= abs(step) * (1 + 1e-9):
            step = stop - x  # end exactly at `stop`, without a tiny last step
        if abs(step) <= 1e-14 * abs(stop - start):
            raise ValueError(f"no step at x = {x} is short enough for tolerance {tolerance}; use a larger one")
        for node, weights in zip(NODES[1:], WEIGHTS[1:], strict=True):
            ahead = y + step * _mean(weights, slopes)
            slopes.append(slope(x + node * step, ahead))
        error = _size(step * _mean(DIFFERENCES, slopes), y, ahead) / tolerance
        accepted = error <= 1  # not where it is NaN
        if accepted:
            x, y = stop if step == stop - x else x + step, ahead
        slopes = slopes[-1:] if accepted else slopes[:1]
        step *= max(SHRINK, min(GROW, SAFETY * error**-0.2)) if 0 < error < math.inf else GROW if accepted else SHRINK
        if accepted:
            yield x, y


def _mean(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """The weighted sum of slopes."""
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


def _size(error: Tensor, y: Tensor, ahead: Tensor) -> float:
    """The largest root mean square of a row of the error, relative to 1 + |y|; NaN if there is any."""
    relative = error / (1 + torch.maximum(y.abs(), ahead.abs()))
    return relative.square().flatten(1).mean(1).sqrt().max().item() if y.dim() > 1 else relative.abs().max().item()
