"""Densities of the times of training, drawn from one uniform number per image (Esser et al. 2024).

A density weights noise levels by their frequency, as WEIGHTINGS of `ldm.losses.diffusion_loss` do by a factor. The
exception is `importance`, which divides losses by their frequency, so that their mean is that of uniform times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.schedules.noise_schedule import Schedule

KEPT = 10  # losses per bin that importance uses (Nichol & Dhariwal 2021, section 3.3)
EVEN = 0.001  # share of uniform draws in importance, so that every bin is drawn, as in the authors' code
NEXT_BIT = 2.0**-30  # keeps draws off the edges of bins


@dataclass(frozen=True, kw_only=True)
class DensityConfig:
    """The density of the times of training."""

    name: str = "uniform"  # a key of DENSITIES
    mean: float | None = None  # logit_normal: of logit(t); edm_lognormal: of ln(sigma / alpha); None: the paper's
    std: float | None = None  # logit_normal, edm_lognormal; None: the paper's
    scale: float = 1.29  # mode: above 0 more times in the middle, below 0 more at both ends

    def __post_init__(self):
        if self.name not in DENSITIES:
            raise ValueError(f"density {self.name!r} is unknown; use one of {', '.join(DENSITIES)}")
        if self.mean is not None and not math.isfinite(self.mean):
            raise ValueError(f"density.mean {self.mean} must be a finite number")
        if self.std is not None and not 0 < self.std < math.inf:
            raise ValueError(f"density.std {self.std} must be a positive number")
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"density.scale {self.scale} must be between -1 and 1.75, where the density is defined")


class WeightedTimes(NamedTuple):
    """Times, and the factors of their losses."""

    t: Tensor  # [B], in the dtype of u
    weight: Tensor  # [B] float64


def _uniform(u: Tensor, schedule: Schedule, config: DensityConfig) -> Tensor:
    """All times equally often (Ho et al. 2020, algorithm 1)."""
    return schedule.quantize(u)


def _logit_normal(u: Tensor, schedule: Schedule, config: DensityConfig) -> Tensor:
    """logit(t) normal, by default with mean 0 and standard deviation 1 (Esser et al. 2024, eq. 19)."""
    return schedule.quantize(torch.sigmoid(_normal(u, config, 0.0, 1.0)))


def _mode(u: Tensor, schedule: Schedule, config: DensityConfig) -> Tensor:
    """1 - u - scale (cos^2(pi u / 2) - 1 + u) (Esser et al. 2024, eq. 20)."""
    return schedule.quantize(1 - u - config.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u))


def _edm_lognormal(u: Tensor, schedule: Schedule, config: DensityConfig) -> Tensor:
    """ln(sigma / alpha) normal, by default with mean -1.2 and standard deviation 1.2 (Karras et al. 2022, table 1).

    The paper's numbers are for pictures of half of unit scale: beside latents their noise is that of mean -0.5.
    """
    return schedule.nearest(schedule.time(_normal(u, config, -1.2, 1.2).exp()))


def _normal(u: Tensor, config: DensityConfig, mean: float, std: float) -> Tensor:
    """The quantile u of a normal distribution."""
    mean, std = mean if config.mean is None else config.mean, std if config.std is None else config.std
    return mean + std * torch.special.ndtri(u)


@dataclass(frozen=True)
class Fixed:
    """A density that does not change in training."""

    place: Callable[[Tensor, Schedule, DensityConfig], Tensor]  # the quantile u of the times, or 1 - u
    schedule: Schedule
    config: DensityConfig

    def draw(self, u: Tensor) -> WeightedTimes:
        """Times and weights of 1, [B] each, for uniform numbers u [B] in [0, 1)."""
        u, dtype = u.to(torch.float64), u.dtype
        return WeightedTimes(self.place(u, self.schedule, self.config).to(dtype), torch.ones_like(u))


class Importance:
    """Draws times where losses are large: p ~ sqrt(E[L^2]) of each of T bins (Nichol & Dhariwal 2021, eq. 18).

    Losses are divided by T p, which preserves their mean. Times are uniform until each bin has KEPT losses. The losses
    are part of a run's state: save and restore them with the weights.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        bins = schedule.config.timesteps
        self.losses = torch.zeros(bins, KEPT, dtype=torch.float64)  # the last ones of each bin, as a ring
        self.counts = torch.zeros(bins, dtype=torch.int64)  # losses seen by each bin

    def draw(self, u: Tensor) -> WeightedTimes:
        """Times and weights, [B] each, for uniform numbers u [B] in [0, 1)."""
        p, bins = self._probabilities(), len(self.counts)
        index, inside = self._bins(u, p)
        even = (index + inside) / bins
        return WeightedTimes(self.schedule.quantize(even).to(u.dtype), 1 / (bins * p[index]))

    def learn(self, u: Tensor, losses: Tensor) -> None:
        """Record the unweighted losses [B] of the times drawn for u [B]; values that are not finite are skipped.

        The order of images matters: pass all losses of an optimizer step at once, in the order of the global batch.
        """
        index, _ = self._bins(u, self._probabilities())
        for bin_, loss in zip(index.tolist(), losses.to("cpu", torch.float64).tolist(), strict=True):
            if math.isfinite(loss):
                self.losses[bin_, self.counts[bin_] % KEPT] = loss
                self.counts[bin_] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The recorded losses."""
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore recorded losses.

        Raises:
            ValueError: they are of another number of timesteps.
        """
        if state["losses"].shape != self.losses.shape:
            raise ValueError(
                f"the state has losses of {len(state['losses'])} timesteps; this schedule has {len(self.losses)}"
            )
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])

    def _probabilities(self) -> Tensor:
        """p [T] of each bin."""
        even, size = torch.full_like(self.losses[:, 0], 1 / len(self.losses)), self.losses.square().mean(1).sqrt()
        if (self.counts < KEPT).any() or not size.any():
            return even
        return (1 - EVEN) * size / size.sum() + EVEN * even

    @staticmethod
    def _bins(u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """The bins that u [B] falls into, and its relative position in them, above 0 and below 1."""
        ends = p.cumsum(0)
        index = torch.searchsorted(ends, u.to(torch.float64), right=True).clamp(max=len(p) - 1)
        inside = 1 - (ends[index] - u) / p[index]
        return index, inside.clamp(NEXT_BIT, 1 - NEXT_BIT)


DENSITIES: dict[str, Callable[[Schedule, DensityConfig], Fixed | Importance]] = {
    "uniform": functools.partial(Fixed, _uniform),
    "logit_normal": functools.partial(Fixed, _logit_normal),
    "mode": functools.partial(Fixed, _mode),
    "edm_lognormal": functools.partial(Fixed, _edm_lognormal),
    "importance": lambda schedule, config: Importance(schedule),
}


def make_density(config: DensityConfig, schedule: Schedule) -> Fixed | Importance:
    """The density that a config names, over the times at which a schedule's networks are trained."""
    return DENSITIES[config.name](schedule, config)
