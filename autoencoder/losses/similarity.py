"""How near a reconstruction is to its picture: PSNR and SSIM (Wang et al. 2004), on images in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def psnr(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of [B, C, H, W] images in [-1, 1] (peak 2), per image: [B]."""
    error = (images - reconstructions.clamp(-1, 1)).float().square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def ssim(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """Structural similarity of [B, C, H, W] images in [-1, 1], per image: [B]; 11 x 11 Gaussian window, sigma 1.5.

    Raises:
        ValueError: images smaller than the window.
    """
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {tuple(images.shape[-2:])}")
    x, y = (images.float() + 1) / 2, (reconstructions.clamp(-1, 1).float() + 1) / 2
    offsets = torch.arange(11, device=x.device) - 5.0
    line = torch.softmax(-offsets.square() / (2 * 1.5**2), 0)
    window = (line[:, None] * line[None]).expand(x.shape[1], 1, 11, 11)

    def blur(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(z, window, groups=z.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(1)
