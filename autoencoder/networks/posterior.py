"""The Gaussian posterior over the latents of a KL autoencoder (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, q(z | x). With a log-variance of -inf it is a point, as with a codebook."""

    mean: Tensor  # [B, c, h, w]
    logvar: Tensor  # [B, c, h, w]

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split moments [B, 2c, h, w] into mean and log-variance, which is clamped to [-30, 20] unless it is -inf."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, torch.where(logvar == -math.inf, logvar, logvar.clamp(-30.0, 20.0)))

    @property
    def moments(self) -> Tensor:
        """Mean and log-variance, [B, 2c, h, w]."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def variance(self) -> Tensor:
        """The variance, [B, c, h, w]."""
        return self.logvar.exp()

    def mode(self) -> Tensor:
        """The most probable latents, [B, c, h, w]."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Latents mean + std * noise, for standard normal noise [B, c, h, w]."""
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over each sample's dimensions: [B] (Kingma & Welling 2014, app. B)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))

    def affine(self, shift: float, scale: float) -> Posterior:
        """The posterior of (z - shift) * scale."""
        return Posterior((self.mean - shift) * scale, self.logvar + 2.0 * math.log(scale))


@dataclass(frozen=True)
class Reconstruction:
    """The result of a training pass through the autoencoder. Latents are those of the networks, not unit-scale."""

    images: Tensor  # [B, 3, H, W]
    posterior: Posterior  # [B, c, h, w]; with a codebook a point: the output of the encoder
    codebook_loss: Tensor | None = None  # [], codebook + beta * commitment; None without a codebook
    indices: Tensor | None = None  # [B, h, w], the codes used; None without a codebook
