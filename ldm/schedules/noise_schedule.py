"""The base of noise schedules, which map times to alpha and sigma (Song et al. 2021, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A noise schedule and its constants; None is the paper's value."""

    name: str = "scaled_linear"  # a key of SCHEDULES
    timesteps: int = 1000  # noise levels T of a table; elsewhere the range of the network's time input
    beta_start: float | None = None  # linear, scaled_linear, sub_vp: variance added by the first of T steps
    beta_end: float | None = None  # linear, scaled_linear, sub_vp: variance added by the last step
    zero_terminal_snr: bool = False  # linear, scaled_linear, cosine: rescale to no signal at t = 1 (Lin et al. 2023)
    sigma_min: float | None = None  # ve, edm: smallest noise level
    sigma_max: float | None = None  # ve, edm: largest noise level; larger than the distance between any two latents
    shift: float = 1.0  # flow: above 1, more time at high noise, as large pictures need: see `resolution_shift`
    continuous: bool = False  # tables: the network is trained at all times, not at T levels; the others always are


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule. Subclasses implement `_levels` (alpha, sigma), `_embedded`, `_located` and `_dlogsnr_dt`.

    Everything is computed on the CPU in float64. Keep times on the CPU, where they do not synchronize an accelerator.
    """

    config: ScheduleConfig

    unit_input = False  # whether the denoiser must divide z_t by sqrt(alpha^2 + sigma^2) before the network sees it

    def __call__(self, t: Tensor | float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times t (any shape, in [0, 1]), in `dtype`, or else in the dtype of t.

        Raises:
            ValueError: a time is outside [0, 1], or in half precision, which is too coarse for noise levels.
        """
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        dtype = dtype or t.dtype
        return tuple(level.to(t.device, dtype) for level in self._levels(self._position(t)))

    def snr(self, t: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at times t; infinite at t = 0."""
        alpha, sigma = self(t, torch.float64)
        return (alpha / sigma).square().to(dtype or (t.dtype if isinstance(t, Tensor) else torch.float64))

    def dlogsnr_dt(self, t: Tensor | float) -> Tensor:
        """-d log(snr) / dt at times t in [1/T, 1], float64; infinite where no signal is left.

        For a table it is that of the interval that ends at t; for its first level, that of the interval that begins.
        """
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        return self._dlogsnr_dt(self._position(t)).to(t.device) * self.config.timesteps

    def timestep(self, t: Tensor | float) -> Tensor:
        """What the network embeds at times t, float32: the index of the noise level, fractional between two levels."""
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        return self._embedded(self._position(t)).to(t.device, torch.float32)

    def time(self, ratio: Tensor | float) -> Tensor:
        """The time t at which sigma / alpha is `ratio`, float64 on the CPU; beyond the last noise level t is 1."""
        return self._located(torch.as_tensor(ratio, dtype=torch.float64)) / self.config.timesteps

    def quantize(self, u: Tensor) -> Tensor:
        """Map uniform u in [0, 1) to the T levels (k + 1) / T with equal frequency, or to times in [1/T, 1)."""
        timesteps, share = self.config.timesteps, u.to(torch.float64)
        if self.discrete:
            t = ((share * timesteps).floor() + 1).clamp(max=timesteps) / timesteps
        else:
            t = 1 / timesteps + (1 - 1 / timesteps) * share
        return t.to(u.dtype)

    def nearest(self, t: Tensor) -> Tensor:
        """The nearest times to t at which networks are trained."""
        timesteps, position = self.config.timesteps, t.to(torch.float64) * self.config.timesteps
        position = position.round() if self.discrete else position
        return position.clamp(1, timesteps).div(timesteps).to(t.dtype)

    @property
    def discrete(self) -> bool:
        """Whether networks are trained at T noise levels only, rather than at all times."""
        return False

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether alpha is 0 at t = 1, where z_t is noise alone."""
        return self(1.0)[0].item() == 0

    def _position(self, t: Tensor) -> Tensor:
        """t in units of noise levels [0, T], float64 on the CPU; float32 times close to a level become it."""
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"times are {t.dtype}, which is too coarse for noise levels; use float32 or float64")
        timesteps = self.config.timesteps
        position = t.detach().to("cpu", torch.float64) * timesteps
        if not ((position >= 0) & (position <= timesteps)).all():
            raise ValueError(f"time {t.detach().flatten().tolist()} is outside [0, 1]")
        if t.dtype == torch.float32:
            level = position.round()
            position = torch.where((position - level).abs() <= timesteps * 2.0**-23, level, position)
        return position


def with_betas(config: ScheduleConfig, start: float, end: float, below: float = 1.0) -> ScheduleConfig:
    """Fill in the paper's betas if they are None, and check them."""
    start = start if config.beta_start is None else config.beta_start
    end = end if config.beta_end is None else config.beta_end
    if not 0 < start <= end < below:
        raise ValueError(f"beta_start {start} and beta_end {end} must satisfy 0 < beta_start <= beta_end < {below:g}")
    return replace(config, beta_start=start, beta_end=end)


def with_sigmas(config: ScheduleConfig, low: float, high: float) -> ScheduleConfig:
    """Fill in the paper's smallest and largest noise level if they are None, and check them."""
    low = low if config.sigma_min is None else config.sigma_min
    high = high if config.sigma_max is None else config.sigma_max
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min {low} must be above 0 and below sigma_max {high}")
    return replace(config, sigma_min=low, sigma_max=high)
