"""Data whose denoiser is known exactly: a mixture of isotropic Gaussians in a few dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.guidance.classifier_free import Denoise
from ldm.schedules.noise_schedule import Schedule


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A mixture of K isotropic Gaussians in D dimensions."""

    weights: Tensor  # [K], their sum is 1
    means: Tensor  # [K, D]
    stds: Tensor  # [K]

    def denoiser(self, schedule: Schedule) -> Denoise:
        """Return the exact denoiser, which computes E[z_0 | z_t] of z_t [..., D]."""

        def denoise(z_t: Tensor, t: float) -> Tensor:
            alpha, sigma = (level.item() for level in schedule(t))
            away = z_t[..., None, :] - alpha * self.means  # [..., K, D]
            share = (self.log_density(away, alpha, sigma)).softmax(-1)[..., None]  # [..., K, 1]
            pull = (alpha * self.stds**2 / self._variance(alpha, sigma))[:, None]  # [K, 1]
            return (share * (self.means + pull * away)).sum(-2)

        return denoise

    def density(self, z: Tensor) -> Tensor:
        """Return the probability density of clean data at z [..., D], up to a constant factor."""
        return self.log_density(z[..., None, :] - self.means, 1.0, 0.0).exp().sum(-1)

    def log_density(self, away: Tensor, alpha: float, sigma: float) -> Tensor:
        """Return the log density of each component [..., K] from the differences to its mean [..., K, D].

        A constant is left out.
        """
        variance = self._variance(alpha, sigma)
        return self.weights.log() - away.shape[-1] / 2 * variance.log() - away.square().sum(-1) / (2 * variance)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample clean data [count, D]."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise

    def _variance(self, alpha: float, sigma: float) -> Tensor:
        """Return the variance of z_t for each component [K]."""
        return alpha**2 * self.stds**2 + sigma**2
