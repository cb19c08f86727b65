"""The times that samplers walk: where they begin, where they end, how the steps between are spaced.

Papers and programs differ in this more than in the samplers themselves (Lin et al. 2023, table 2). What a sampler does
where nobody says otherwise is its `TimeDefaults`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.schedules.base import Schedule

LARGEST_RATIO = 4096.0  # sigma / alpha that stands for infinity where a logarithm or a root of it is needed
KARRAS_RHO = 7.0  # Karras et al. 2022, table 1
RUNGS = 50  # levels that consistency is distilled on
# sigma / alpha where ten steps on Stable Diffusion 1's schedule begin, and where the last of them ends, optimized for
# its samples (Sabour et al. 2024, "Align Your Steps", arXiv:2404.14507, and its project page).
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


@dataclass(frozen=True, kw_only=True)
class TimeDefaults:
    """How a sampler chooses its times, and begins; the same habits as in diffusers."""

    spacing: str = "leading"  # a key of SPACINGS, where neither the caller nor the model names one
    fractional: bool = False  # linspace may fall between noise levels, and the network is told so
    drops_lowest: bool = False  # of leading and linspace, one time more is laid out, and the lowest left out
    ends_clean: bool | None = None  # at t = 0, or at the first noise level, unless the model says; None: always at 0
    noise_only: bool = False  # begins with the variance of noise alone, not of noised latents, except for leading


class Layout(NamedTuple):
    """What a spacing is to lay out."""

    schedule: Schedule
    steps: int  # times to return
    points: int  # times to lay out, of which the lowest are left out
    offset: int  # leading: the lowest index
    fractional: bool

    @property
    def levels(self) -> int:
        """Noise levels of the schedule."""
        return self.schedule.config.timesteps


def _trailing(ask: Layout) -> Tensor:
    """T, T - T/S, ...: begins at t = 1, where sampling begins (Lin et al. 2023, section 3.3)."""
    step = ask.levels - (ask.levels - ask.levels / ask.steps)  # as numpy adds it: the last bit decides between levels
    positions = ask.levels - torch.arange(ask.steps, dtype=torch.float64) * step
    return positions.round() if ask.schedule.discrete else positions


def _leading(ask: Layout) -> Tensor:
    """Whole strides of T // S from the offset up: indices 981, ..., 21, 1 for 50 steps of 1000, as LDM's DDIM.

    Never t = 1. The offset gives way where the highest index would pass the last level.
    """
    stride = ask.levels // ask.points
    lowest = stride * (ask.points - ask.steps) + ask.offset
    lowest = min(lowest, ask.levels - 1 - stride * (ask.steps - 1))
    return 1 + lowest + stride * torch.arange(ask.steps - 1, -1, -1, dtype=torch.float64)


def _linspace(ask: Layout) -> Tensor:
    """T, ..., 1 in equal parts, both ends included; a single one is T."""
    index = torch.arange(ask.points, dtype=torch.float64) * ((ask.levels - 1) / max(ask.points - 1, 1))
    index[-1] = ask.levels - 1
    if ask.schedule.discrete and not ask.fractional:
        index = index.round()
    return 1 + index.flip(0)[: ask.steps]


def _karras(ask: Layout) -> Tensor:
    """(sigma / alpha)^(1/7) in equal parts from the last noise level to the first (Karras et al. 2022, eq. 5)."""
    high, low = _ends(ask).pow(1 / KARRAS_RHO)
    return _positions(ask, (high + _parts(ask) * (low - high)).pow(KARRAS_RHO))


def _log_snr(ask: Layout) -> Tensor:
    """log(sigma / alpha) in equal parts from the last noise level to the first (Lu et al. 2022, arXiv:2206.00927)."""
    high, low = _ends(ask).log()
    return _positions(ask, (high + _parts(ask) * (low - high)).exp())


def _ays(ask: Layout) -> Tensor:
    """The noise levels of `ALIGNED`, for other numbers of steps with equal parts of logs between them.

    It begins at t = 1 whatever sigma / alpha is there, and leaves out levels that the schedule does not reach.
    """
    (high, low), last = _ends(ask).log().tolist(), len(ALIGNED) - 1
    reached = {index: math.log(ratio) for index, ratio in enumerate(ALIGNED) if low < math.log(ratio) < high}
    known = torch.tensor(sorted(({last: low} | reached | {0: high}).items()), dtype=torch.float64)
    at, logs = known[:, 0] * (ask.steps / last), known[:, 1].contiguous()
    step = torch.arange(ask.steps, dtype=torch.float64)
    after = torch.searchsorted(at, step, right=True)
    share = (step - at[after - 1]) / (at[after] - at[after - 1])
    positions = _positions(ask, torch.lerp(logs[after - 1], logs[after], share).exp())
    positions[0] = ask.levels
    return positions


def _rungs(ask: Layout) -> Tensor:
    """Every few of the 50 levels that consistency is distilled on: 1, 0.76, 0.5, 0.26 (Luo et al. 2023, LCM).

    More than 50 steps are trailing.
    """
    if ask.steps > RUNGS:
        return _trailing(ask)
    index = torch.arange(ask.steps, dtype=torch.float64) * RUNGS // ask.steps
    positions = ask.levels * (1 - index / RUNGS)
    return positions.round() if ask.schedule.discrete else positions


def _ends(ask: Layout) -> Tensor:
    """sigma / alpha of the last noise level and of the first."""
    alpha, sigma = ask.schedule(torch.tensor([ask.levels, 1.0], dtype=torch.float64) / ask.levels)
    return torch.where(alpha == 0, LARGEST_RATIO, sigma / alpha)


def _parts(ask: Layout) -> Tensor:
    """0 to 1 in equal parts; a single one is 0."""
    return torch.linspace(0, 1, ask.steps, dtype=torch.float64)


def _positions(ask: Layout, ratios: Tensor) -> Tensor:
    """Where sigma / alpha has these values; between levels, and so as strictly falling as they are."""
    return (ask.schedule.time(ratios) * ask.levels).clamp(min=1)  # a last bit below the first level is not


SPACINGS: dict[str, Callable[[Layout], Tensor]] = {  # -> [S] falling positions, in noise levels, up to T
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
    """The times a sampler walks, float64 [steps + 1], falling to where it ends.

    Each is the time of a noise level where the schedule has levels, unless the habit or the spacing says otherwise.

    Args:
        schedule: the noise levels.
        steps: of the sampler.
        spacing: a key of SPACINGS.
        habit: the sampler's.
        offset: lowest index of leading, what diffusers calls steps_offset.
        ends_clean: at t = 0 or at the first noise level, what diffusers calls set_alpha_to_one; None: as the habit is.

    Raises:
        ValueError: an unknown spacing, or a number of steps below 1 or above the number of noise levels.
    """
    levels = schedule.config.timesteps
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; use one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= levels:
        raise ValueError(f"{steps} steps is not between 1 and {levels}, the number of noise levels of the schedule")
    points = min(steps + 1, levels) if time_defaults.drops_lowest else steps
    positions = SPACINGS[spacing](Layout(schedule, steps, points, offset, time_defaults.fractional))
    clean = True if time_defaults.ends_clean is None else time_defaults.ends_clean if ends_clean is None else ends_clean
    end = torch.zeros(1, dtype=torch.float64) if clean else torch.ones(1, dtype=torch.float64)
    return torch.cat([positions, end]) / levels
