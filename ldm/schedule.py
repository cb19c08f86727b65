"""Noise schedules t -> (alpha, sigma) with z_t = alpha z_0 + sigma noise (Ho et al. 2020; Song & Ermon 2019).

Time t runs from 0 (clean: alpha 1, sigma 0) to 1 (noise). Variance-preserving and variance-exploding schedules are
tables of T noise levels whose index k, as papers count it, is t = (k + 1) / T. Rectified flow has no table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Which noise schedule, and its constants."""

    name: str = "scaled_linear"  # a key of SCHEDULES
    timesteps: int = 1000  # noise levels T of a table; for flow, the range of the network's time input
    beta_start: float | None = None  # linear, scaled_linear: variance added by the first step; None: the paper's value
    beta_end: float | None = None  # linear, scaled_linear: variance added by the last step; None: the paper's value
    zero_terminal_snr: bool = False  # linear, scaled_linear, cosine: rescale to no signal at t = 1 (Lin et al. 2023)
    sigma_min: float = 0.01  # ve: smallest noise level
    sigma_max: float = 50.0  # ve: largest noise level; larger than the distance between any two latents
    shift: float = 1.0  # flow: above 1, more time at high noise, as large pictures need (Esser et al. 2024, eq. 23)


@dataclass(frozen=True, eq=False)
class Schedule:
    """What all schedules share. A subclass adds `_levels` (alpha, sigma), `_embedded`, `_located` and `quantize`.

    All is computed on the CPU in float64. Keep times there: numbers on the CPU never make an accelerator wait.
    """

    config: ScheduleConfig

    discrete = True  # whether networks are trained at T noise levels only, rather than at all times
    unit_input = False  # whether the denoiser must divide z_t by sqrt(alpha^2 + sigma^2) before the network sees it

    def __call__(self, t: Tensor | float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times t (any shape, in [0, 1]), in `dtype`, or else in the dtype of t.

        Raises:
            ValueError: a time is outside [0, 1], or in half precision, which cannot tell neighbouring levels apart.
        """
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        dtype = dtype or t.dtype
        return tuple(level.to(t.device, dtype) for level in self._levels(self._position(t)))

    def snr(self, t: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at times t; infinite at t = 0."""
        alpha, sigma = self(t, torch.float64)
        return (alpha / sigma).square().to(dtype or (t.dtype if isinstance(t, Tensor) else torch.float64))

    def timestep(self, t: Tensor | float) -> Tensor:
        """What the network embeds at times t, float32: the index of the noise level, fractional between two levels."""
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        return self._embedded(self._position(t)).to(t.device, torch.float32)

    def time(self, ratio: Tensor | float) -> Tensor:
        """The time t at which sigma / alpha is `ratio`, float64 on the CPU; beyond the last noise level t is 1."""
        return self._located(torch.as_tensor(ratio, dtype=torch.float64)) / self.config.timesteps

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether alpha is 0 at t = 1: nothing of z_0 is left there, and noise alone says nothing about it."""
        return self(1.0)[0].item() == 0

    def _position(self, t: Tensor) -> Tensor:
        """t in units of noise levels [0, T], float64 on the CPU; float32 times snap to the level they mean."""
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"times are {t.dtype}, which blurs noise levels together; use float32 or float64")
        timesteps = self.config.timesteps
        position = t.detach().to("cpu", torch.float64) * timesteps
        if not ((position >= 0) & (position <= timesteps)).all():
            raise ValueError(f"time {t.detach().flatten().tolist()} is outside [0, 1]")
        if t.dtype == torch.float32:
            level = position.round()
            position = torch.where((position - level).abs() <= timesteps * 2.0**-23, level, position)
        return position


@dataclass(frozen=True, eq=False)
class TableSchedule(Schedule):
    """T noise levels given by their ratios sigma / alpha; between two of them log(sigma / alpha) is linear in t.

    Below the first level sigma / alpha is linear, and down to it from infinity alpha / sigma is, since logs end there.
    """

    ratios: Tensor  # [T + 1] float64, rising sigma / alpha of clean data (0) and each level; the last may be infinite

    def quantize(self, u: Tensor) -> Tensor:
        """u uniform on [0, 1) -> t = (k + 1) / T, each of the T levels equally often."""
        timesteps = self.config.timesteps
        return ((u.to(torch.float64) * timesteps).floor() + 1).clamp(max=timesteps).div(timesteps).to(u.dtype)

    def _ratio(self, position: Tensor) -> Tensor:
        """sigma / alpha at positions [0, T]."""
        below = position.floor().clamp(max=self.config.timesteps - 1)
        weight = position - below
        low, high = self.ratios[below.long()], self.ratios[below.long() + 1]
        ratio = torch.exp((1 - weight) * low.log() + weight * high.log())
        ratio = torch.where(weight == 0, low, torch.where(weight == 1, high, ratio))
        ratio = torch.where(below == 0, weight * high, ratio)
        return torch.where(high.isinf(), low / (1 - weight), ratio)

    def _embedded(self, position: Tensor) -> Tensor:
        return (position - 1).clamp(min=0)  # below the first level the network is told the first

    def _located(self, ratio: Tensor) -> Tensor:
        """The inverse of `_ratio`."""
        below = (torch.searchsorted(self.ratios, ratio, right=True) - 1).clamp(0, self.config.timesteps - 1)
        low, high = self.ratios[below], self.ratios[below + 1]
        weight = (ratio / low).log() / (high / low).log()
        weight = torch.where(below == 0, ratio / high, weight)
        return below + torch.where(high.isinf(), 1 - low / ratio, weight).clamp(max=1)


class VariancePreserving(TableSchedule):
    """alpha^2 + sigma^2 = 1 (Ho et al. 2020)."""

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        ratio, one = self._ratio(position), torch.ones((), dtype=torch.float64)
        return 1 / torch.hypot(one, ratio), 1 / torch.hypot(one, 1 / ratio)  # exact at ratios 0 and infinity


class VarianceExploding(TableSchedule):
    """alpha = 1, sigma grows geometrically (Song et al. 2021, eq. 31)."""

    unit_input = True

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self._ratio(position)
        return torch.ones_like(ratio), ratio


class RectifiedFlow(Schedule):
    """alpha = 1 - sigma, sigma = shift t / (1 + (shift - 1) t) (Liu et al. 2022; Esser et al. 2024)."""

    discrete = False

    def quantize(self, u: Tensor) -> Tensor:
        """u uniform on [0, 1) -> t in [1/T, 1)."""
        lowest = 1 / self.config.timesteps
        return (lowest + (1 - lowest) * u.to(torch.float64)).to(u.dtype)

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        t, shift = position / self.config.timesteps, self.config.shift
        whole = 1 + (shift - 1) * t
        return (1 - t) / whole, shift * t / whole

    def _embedded(self, position: Tensor) -> Tensor:
        return self._levels(position)[1] * self.config.timesteps  # sigma, so that a network outlives its shift

    def _located(self, ratio: Tensor) -> Tensor:
        unshifted = ratio / self.config.shift  # sigma / alpha = shift t / (1 - t)
        return torch.where(unshifted.isinf(), 1.0, unshifted / (1 + unshifted)) * self.config.timesteps


def _from_betas(config: ScheduleConfig, betas: Tensor) -> VariancePreserving:
    """The schedule whose step k adds noise of variance betas[k] (Ho et al. 2020, eq. 4)."""
    alpha_bar = torch.cumprod(1 - betas, 0)
    if config.zero_terminal_snr:  # Lin et al. 2023, algorithm 1: shift sqrt(alpha_bar) to end at 0, keep its start
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    alpha_bar = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar])
    return VariancePreserving(config, ((1 - alpha_bar) / alpha_bar).sqrt())


def _with_betas(config: ScheduleConfig, start: float, end: float) -> ScheduleConfig:
    """Fill in the paper's betas where none are given, and check them."""
    start = start if config.beta_start is None else config.beta_start
    end = end if config.beta_end is None else config.beta_end
    if not 0 < start <= end < 1:
        raise ValueError(f"beta_start {start} and beta_end {end} must satisfy 0 < beta_start <= beta_end < 1")
    return replace(config, beta_start=start, beta_end=end)


def _linear(config: ScheduleConfig) -> Schedule:
    """beta linear in k (Ho et al. 2020)."""
    config = _with_betas(config, 1e-4, 0.02)
    ends = config.beta_start, config.beta_end
    return _from_betas(config, torch.linspace(*ends, config.timesteps, dtype=torch.float64))


def _scaled_linear(config: ScheduleConfig) -> Schedule:
    """sqrt(beta) linear in k (Rombach et al. 2022, whose code calls this linear)."""
    config = _with_betas(config, 0.00085, 0.012)
    ends = config.beta_start**0.5, config.beta_end**0.5
    return _from_betas(config, torch.linspace(*ends, config.timesteps, dtype=torch.float64).square())


def _cosine(config: ScheduleConfig) -> Schedule:
    """alpha_bar a squared cosine of k, betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    k = torch.linspace(0, 1, config.timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((k + 0.008) / 1.008 * math.pi / 2).square()
    return _from_betas(config, (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


def _ve(config: ScheduleConfig) -> Schedule:
    """sigma geometric from sigma_min to sigma_max (Song & Ermon 2019)."""
    if not 0 < config.sigma_min < config.sigma_max < math.inf:
        raise ValueError(f"sigma_min {config.sigma_min} must be above 0 and below sigma_max {config.sigma_max}")
    ends = math.log(config.sigma_min), math.log(config.sigma_max)
    sigmas = torch.linspace(*ends, config.timesteps, dtype=torch.float64).exp()
    return VarianceExploding(config, torch.cat([torch.zeros_like(sigmas[:1]), sigmas]))


def _flow(config: ScheduleConfig) -> Schedule:
    """Straight lines from data to noise."""
    if not 0 < config.shift < math.inf:
        raise ValueError(f"shift {config.shift} must be a positive number; 1 is none")
    return RectifiedFlow(config)


SCHEDULES: dict[str, Callable[[ScheduleConfig], Schedule]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "ve": _ve,
    "flow": _flow,
}


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Build the schedule that a config names; its own `.config` has every default filled in.

    Raises:
        ValueError: an unknown name, a constant out of range, or an option that the schedule does not have.
    """
    if config.name not in SCHEDULES:
        raise ValueError(f"unknown schedule {config.name!r}; use one of {', '.join(SCHEDULES)}")
    if config.timesteps < 2:
        raise ValueError(f"timesteps {config.timesteps} must be at least 2")
    if config.zero_terminal_snr and config.name in ("ve", "flow"):
        raise ValueError(f"zero_terminal_snr is for linear, scaled_linear and cosine, not {config.name}; unset it")
    return SCHEDULES[config.name](config)
