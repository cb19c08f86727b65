"""Noise schedules that are formulas, for networks trained at all times: sub-VP, EDM, rectified flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.schedules.noise_schedule import Schedule, ScheduleConfig, with_betas, with_sigmas

RHO = 7.0  # Karras et al. 2022, table 1


class SubVariancePreserving(Schedule):
    """alpha = exp(-B / 2), sigma = 1 - exp(-B), B the integral of beta up to t (Song et al. 2021, eq. 29).

    The variance of z_t for latents of unit scale is between 3/4 and 1.
    """

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        start, rise = self._betas()
        integral = start * position + rise / 2 * position**2
        return torch.exp(-integral / 2), -torch.expm1(-integral)

    def _embedded(self, position: Tensor) -> Tensor:
        return (position - 1).clamp(min=0)  # the index, as if there were levels

    def _located(self, ratio: Tensor) -> Tensor:
        start, rise = self._betas()
        integral = 2 * torch.asinh(ratio / 2)  # sigma / alpha = 2 sinh(B / 2)
        position = 2 * integral / (start + (start**2 + 2 * rise * integral).sqrt())
        return torch.where(integral.isinf(), math.inf, position).clamp(max=self.config.timesteps)

    def _dlogsnr_dt(self, position: Tensor) -> Tensor:
        start, rise = self._betas()
        integral = start * position + rise / 2 * position**2
        return (start + rise * position) / torch.tanh(integral / 2)

    def _betas(self) -> tuple[float, float]:
        """beta at t = 0, and its increase per noise level."""
        return self.config.beta_start, (self.config.beta_end - self.config.beta_start) / self.config.timesteps


class Edm(Schedule):
    """alpha = 1, sigma^(1/7) linear in t from the first of T levels, sigma linear below it (Karras et al. 2022, eq. 5).

    Latents have unit scale, so sigma_data is always 1: the paper's models of pixels, with sigma_data 0.5,
    correspond to pixels and sigmas multiplied by 2.
    """

    unit_input = True

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.where(position < 1, position * self.config.sigma_min, self._root(position) ** RHO)
        return torch.ones_like(sigma), sigma

    def _embedded(self, position: Tensor) -> Tensor:
        """ln(sigma) / 4, as in table 1, mapped linearly to [0, T]."""
        low, high = math.log(self.config.sigma_min), math.log(self.config.sigma_max)
        return (RHO * self._root(position).log() - low) / (high - low) * self.config.timesteps

    def _located(self, ratio: Tensor) -> Tensor:
        low, slope = self._line()
        position = 1 + (ratio ** (1 / RHO) - low) / slope
        position = torch.where(ratio < self.config.sigma_min, ratio / self.config.sigma_min, position)
        return position.clamp(max=self.config.timesteps)

    def _dlogsnr_dt(self, position: Tensor) -> Tensor:
        return 2 * RHO * self._line()[1] / self._root(position)

    def _root(self, position: Tensor) -> Tensor:
        """sigma^(1/7); below the first level that of the first."""
        low, slope = self._line()
        return low + (position - 1).clamp(min=0) * slope

    def _line(self) -> tuple[float, float]:
        """sigma^(1/7) of the first level, and its increase per level."""
        low, high = self.config.sigma_min ** (1 / RHO), self.config.sigma_max ** (1 / RHO)
        return low, (high - low) / (self.config.timesteps - 1)


class RectifiedFlow(Schedule):
    """alpha = 1 - sigma, sigma = shift t / (1 + (shift - 1) t) (Liu et al. 2022; Esser et al. 2024, eq. 23)."""

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        t, shift = position / self.config.timesteps, self.config.shift
        whole = 1 + (shift - 1) * t
        return (1 - t) / whole, shift * t / whole

    def _embedded(self, position: Tensor) -> Tensor:
        return self._levels(position)[1] * self.config.timesteps  # sigma, so that a network works with any shift

    def _located(self, ratio: Tensor) -> Tensor:
        unshifted = ratio / self.config.shift  # sigma / alpha = shift t / (1 - t)
        return torch.where(unshifted.isinf(), 1.0, unshifted / (1 + unshifted)) * self.config.timesteps

    def _dlogsnr_dt(self, position: Tensor) -> Tensor:
        return 2 / position + 2 / (self.config.timesteps - position)


def resolution_shift(pixels: int, trained_pixels: int) -> float:
    """The shift of flow at which noise hides images of `pixels` pixels as much as `trained_pixels` at shift 1.

    It is sqrt(m / n): an image of m pixels needs sqrt(m / n) times the sigma / alpha of one of n pixels. Multiply it by
    the shift that the model was trained with (Esser et al. 2024, eq. 23).

    Raises:
        ValueError: a number of pixels is not positive.
    """
    if pixels <= 0 or trained_pixels <= 0:
        raise ValueError(f"{pixels} pixels and {trained_pixels} trained pixels must both be above 0")
    return math.sqrt(pixels / trained_pixels)


def sub_vp(config: ScheduleConfig) -> Schedule:
    """Less variance than the linear schedule of the same betas, for likelihoods (Song et al. 2021, section 3.4)."""
    return SubVariancePreserving(with_betas(config, 0.1 / config.timesteps, 20 / config.timesteps, below=math.inf))


def edm(config: ScheduleConfig) -> Schedule:
    """sigma from sigma_min to sigma_max with alpha 1, most of the time at low noise (Karras et al. 2022)."""
    return Edm(with_sigmas(config, 0.002, 80.0))


def flow(config: ScheduleConfig) -> Schedule:
    """Straight lines from data to noise."""
    if not 0 < config.shift < math.inf:
        raise ValueError(f"shift {config.shift} must be a positive number; 1 is none")
    return RectifiedFlow(config)
