"""Measurements of latents after training the autoencoder: their scale, and their colors for previews."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.networks.posterior import Posterior


class LatentStatistics:
    """Running mean and standard deviation of latents sampled from posteriors, computed without drawing noise.

    `sums` (float64 [2c + 1]: sums, sums of squares, count) can be summed over processes before reading the results.
    """

    def __init__(self, channels: int):
        self.channels = channels
        self.sums = torch.zeros(2 * channels + 1, dtype=torch.float64)

    def update(self, posterior: Posterior) -> None:
        """Add a batch of posteriors [B, c, h, w]."""
        mean = posterior.mean.detach().double()
        squares = mean.square() + posterior.variance.detach().double()
        total = [mean.sum(dim=(0, 2, 3)), squares.sum(dim=(0, 2, 3)), mean.new_tensor([mean[:, 0].numel()])]
        self.sums += torch.cat(total).cpu()

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 [c]. Raises ValueError if nothing was added."""
        if self.sums[-1] == 0:
            raise ValueError("latent statistics over 0 batches have no mean; update them with at least one posterior")
        return self.sums[: self.channels] / self.sums[-1]

    @property
    def std(self) -> float:
        """Standard deviation over all channels: the square root of the mean of their variances."""
        variance = self.sums[self.channels : -1] / self.sums[-1] - self.mean.square()
        return variance.mean().clamp(min=0).sqrt().item()


@torch.no_grad()
def latent_rgb(latents: Tensor, images: Tensor) -> Tensor:
    """Fit colors to latents by least squares, for previews while sampling: [c + 1, 3], with the offset in the last row.

    Args:
        latents: unit-scale latents [B, c, h, w].
        images: their images [B, 3, H, W] in [-1, 1].
    """
    colors = F.adaptive_avg_pool2d(images.double(), latents.shape[-2:]).permute(0, 2, 3, 1).reshape(-1, 3)
    vectors = latents.double().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    vectors = torch.cat([vectors, torch.ones_like(vectors[:, :1])], dim=1)  # [N, c + 1]
    ridge = 1e-6 * vectors.shape[0] * torch.eye(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    return torch.linalg.solve(vectors.T @ vectors + ridge, vectors.T @ colors).float()


def preview(latents: Tensor, matrix: Tensor) -> Tensor:
    """Approximate images [B, 3, h, w] in [-1, 1] of unit-scale latents [B, c, h, w], by the matrix of `latent_rgb`."""
    matrix = matrix.to(latents)
    colors = torch.einsum("bchw,cr->brhw", latents, matrix[:-1]) + matrix[-1][:, None, None]
    return colors.clamp(-1.0, 1.0)
