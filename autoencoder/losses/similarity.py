"""Image similarity: PSNR and SSIM (Wang et al. 2004) of images in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for images in [0, 1]


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images [B, C, H, W] in [-1, 1], whose peak is 2: [B].

    Reconstructions are clamped to [-1, 1].
    """
    error = (images - reconstructions.clamp(-1, 1)).float().square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of images [B, C, H, W] in [-1, 1]: [B]. Reconstructions are clamped to [-1, 1].

    Raises:
        ValueError: the images are smaller than the window, 11 x 11 pixels.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {tuple(images.shape[-2:])}")
    a, b = (images.float() + 1) / 2, (reconstructions.clamp(-1, 1).float() + 1) / 2
    luminance, contrast = ssim_terms(a, b, gaussian_window().to(a.device))
    return (luminance * contrast).flatten(1).mean(1)


def gaussian_window() -> Tensor:
    """One row of SSIM's Gaussian window, [11], with sum 1."""
    window = torch.exp(-0.5 * ((torch.arange(WINDOW) - WINDOW // 2) / SIGMA).square())
    return window / window.sum()


def ssim_terms(a: Tensor, b: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """The luminance and contrast-structure terms of SSIM in each window (Wang et al. 2004, eqs. 6, 9 and 10).

    Args:
        a, b: images [B, C, H, W] in [0, 1].
        window: `gaussian_window`.

    Returns:
        Two tensors [B, C, H - 10, W - 10]; SSIM is the mean of their product.
    """
    mean_a, mean_b = _smooth(a, window), _smooth(b, window)
    variance_a = _smooth(a * a, window) - mean_a.square()
    variance_b = _smooth(b * b, window) - mean_b.square()
    covariance = _smooth(a * b, window) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return luminance, (2 * covariance + C2) / (variance_a + variance_b + C2)


def _smooth(x: Tensor, window: Tensor) -> Tensor:
    channels = x.shape[1]
    rows = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    with torch.autocast(x.device.type, enabled=False):  # variances are small differences of large numbers
        return F.conv2d(F.conv2d(x, rows, groups=channels), rows.transpose(2, 3), groups=channels)
