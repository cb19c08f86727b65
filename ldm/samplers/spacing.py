"""The times of a sampler's steps: where they begin, where they end, and how they are spaced.

Papers and programs differ more in these than in the samplers themselves (Lin et al. 2023, table 2). `TimeDefaults` are
the defaults of a sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.schedules.noise_schedule import Schedule

LARGEST_RATIO = 4096.0  # sigma / alpha in place of infinity, for logarithms and roots
KARRAS_RHO = 7.0  # Karras et al. 2022, table 1
RUNGS = 50  # levels that consistency is distilled on
# sigma / alpha where ten steps on Stable Diffusion 1's schedule begin, and where the last of them ends, optimized for
# its samples (Sabour et al. 2024, "Align Your Steps", arXiv:2404.14507, and its project page).
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


@dataclass(frozen=True, kw_only=True)
class TimeDefaults:
    """How a sampler chooses its times and its initial noise by default; the same as in diffusers."""

    spacing: str = "leading"  # a key of SPACINGS, unless the caller or the model specifies one
    fractional: bool = False  # linspace may fall between noise levels, with fractional timesteps
    drops_lowest: bool = False  # leading and linspace have one more time, and the lowest is dropped
    ends_clean: bool | None = None  # at t = 0 or the first noise level, unless the model specifies it; None: at 0
    noise_only: bool = False  # begin with the variance of noise alone, not of noised latents, except for leading


class TimeGrid(NamedTuple):
    """The arguments of a spacing."""

    schedule: Schedule
    steps: int  # times to return
    points: int  # times to compute, of which the lowest are dropped
    offset: int  # leading: the lowest index
    fractional: bool

    @property
    def levels(self) -> int:
        """Noise levels of the schedule."""
        return self.schedule.config.timesteps


def _trailing(grid: TimeGrid) -> Tensor:
    """T, T - T/S, ...: begins at t = 1, where sampling begins (Lin et al. 2023, section 3.3)."""
    step = grid.levels - (grid.levels - grid.levels / grid.steps)  # as in numpy, to the bit
    positions = grid.levels - torch.arange(grid.steps, dtype=torch.float64) * step
    return positions.round() if grid.schedule.discrete else positions


def _leading(grid: TimeGrid) -> Tensor:
    """Whole strides of T // S from the offset up: indices 981, ..., 21, 1 for 50 steps of 1000, as LDM's DDIM.

    Never t = 1. The offset is reduced if the highest index would exceed the last level.
    """
    stride = grid.levels // grid.points
    lowest = stride * (grid.points - grid.steps) + grid.offset
    lowest = min(lowest, grid.levels - 1 - stride * (grid.steps - 1))
    return 1 + lowest + stride * torch.arange(grid.steps - 1, -1, -1, dtype=torch.float64)


def _linspace(grid: TimeGrid) -> Tensor:
    """T, ..., 1 in equal parts, both ends included; a single one is T."""
    index = torch.arange(grid.points, dtype=torch.float64) * ((grid.levels - 1) / max(grid.points - 1, 1))
    index[-1] = grid.levels - 1
    if grid.schedule.discrete and not grid.fractional:
        index = index.round()
    return 1 + index.flip(0)[: grid.steps]


def _karras(grid: TimeGrid) -> Tensor:
    """(sigma / alpha)^(1/7) in equal parts from the last noise level to the first (Karras et al. 2022, eq. 5)."""
    high, low = _ends(grid).pow(1 / KARRAS_RHO)
    return _positions(grid, (high + _parts(grid) * (low - high)).pow(KARRAS_RHO))


def _log_snr(grid: TimeGrid) -> Tensor:
    """log(sigma / alpha) in equal parts from the last noise level to the first (Lu et al. 2022, arXiv:2206.00927)."""
    high, low = _ends(grid).log()
    return _positions(grid, (high + _parts(grid) * (low - high)).exp())


def _ays(grid: TimeGrid) -> Tensor:
    """The noise levels of `ALIGNED`, for other numbers of steps with equal parts of logs between them.

    It always begins at t = 1, and skips levels that the schedule does not reach.
    """
    (high, low), last = _ends(grid).log().tolist(), len(ALIGNED) - 1
    reached = {index: math.log(ratio) for index, ratio in enumerate(ALIGNED) if low < math.log(ratio) < high}
    points = torch.tensor(sorted(({last: low} | reached | {0: high}).items()), dtype=torch.float64)
    at, logs = points[:, 0] * (grid.steps / last), points[:, 1].contiguous()
    step = torch.arange(grid.steps, dtype=torch.float64)
    after = torch.searchsorted(at, step, right=True)
    share = (step - at[after - 1]) / (at[after] - at[after - 1])
    positions = _positions(grid, torch.lerp(logs[after - 1], logs[after], share).exp())
    positions[0] = grid.levels
    return positions


def _rungs(grid: TimeGrid) -> Tensor:
    """Every few of the 50 levels that consistency is distilled on: 1, 0.76, 0.5, 0.26 (Luo et al. 2023, LCM).

    More than 50 steps are trailing.
    """
    if grid.steps > RUNGS:
        return _trailing(grid)
    index = torch.arange(grid.steps, dtype=torch.float64) * RUNGS // grid.steps
    positions = grid.levels * (1 - index / RUNGS)
    return positions.round() if grid.schedule.discrete else positions


def _ends(grid: TimeGrid) -> Tensor:
    """sigma / alpha of the last noise level and of the first."""
    alpha, sigma = grid.schedule(torch.tensor([grid.levels, 1.0], dtype=torch.float64) / grid.levels)
    return torch.where(alpha == 0, LARGEST_RATIO, sigma / alpha)


def _parts(grid: TimeGrid) -> Tensor:
    """0 to 1 in equal parts; a single one is 0."""
    return torch.linspace(0, 1, grid.steps, dtype=torch.float64)


def _positions(grid: TimeGrid, ratios: Tensor) -> Tensor:
    """The positions at which sigma / alpha has these values, also between levels, so that they fall strictly."""
    return (grid.schedule.time(ratios) * grid.levels).clamp(min=1)  # rounding may give just below 1


SPACINGS: dict[str, Callable[[TimeGrid], Tensor]] = {  # -> [S] falling positions, in noise levels, up to T
    "trailing": _trailing,
    "leading": _leading,
    "linspace": _linspace,
    "karras": _karras,
    "log_snr": _log_snr,
    "ays": _ays,
    "rungs": _rungs,
}


def times(
    schedule: Schedule,
    steps: int,
    spacing: str = "trailing",
    time_defaults: TimeDefaults = TimeDefaults(),
    offset: int = 1,
    ends_clean: bool | None = None,
) -> Tensor:
    """The times of a sampler's steps, float64 [steps + 1], falling.

    Each is the time of a noise level if the schedule has levels, unless the defaults or the spacing allow others.

    Args:
        schedule: the noise levels.
        steps: of the sampler.
        spacing: a key of SPACINGS.
        time_defaults: of the sampler.
        offset: lowest index of leading, what diffusers calls steps_offset.
        ends_clean: at t = 0 or at the first noise level, what diffusers calls set_alpha_to_one; None: the sampler's
            default.

    Raises:
        ValueError: an unknown spacing, or a number of steps below 1 or above the number of noise levels.
    """
    levels = schedule.config.timesteps
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; use one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= levels:
        raise ValueError(f"{steps} steps is not between 1 and {levels}, the number of noise levels of the schedule")
    points = min(steps + 1, levels) if time_defaults.drops_lowest else steps
    positions = SPACINGS[spacing](TimeGrid(schedule, steps, points, offset, time_defaults.fractional))
    clean = True if time_defaults.ends_clean is None else time_defaults.ends_clean if ends_clean is None else ends_clean
    end = torch.zeros(1, dtype=torch.float64) if clean else torch.ones(1, dtype=torch.float64)
    return torch.cat([positions, end]) / levels
