"""Perceptual distances between images and reconstructions: LPIPS, and alternatives that need no download.

All map images and reconstructions [B, 3, H, W] in [-1, 1] to [B], with gradients for the reconstructions. A further
alternative, feature matching with the discriminator, is in `first_stage_loss`. docs/perceptual.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.losses.lpips import LPIPS
from autoencoder.losses.similarity import WINDOW, gaussian_window, ssim_terms
from autoencoder.losses.trained_features import FeatureConfig, FeatureDistance, FeatureNetwork


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual distance and its options."""

    kind: str = "features"  # none | lpips | ssim | focal_frequency | features
    vgg: str | None = None  # lpips: file with torchvision's VGG16 weights
    lpips: str | None = None  # lpips: file with the official linear weights
    features: FeatureConfig = field(default_factory=FeatureConfig)  # features: the network and its training


class MultiScaleSSIM(nn.Module):
    """1 - MS-SSIM (Wang et al. 2003, eq. 7), over those of the five scales that are at least as large as the window.

    Raises:
        ValueError: a side of the images is shorter than the window, 11 pixels.
    """

    SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

    def __init__(self):
        super().__init__()
        self.register_buffer("window", gaussian_window(), persistent=False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        a, b = (images.float() + 1) / 2, (reconstructions.float() + 1) / 2  # SSIM is defined on [0, 1]
        side = min(a.shape[-2:])
        if side < WINDOW:
            raise ValueError(f"image size {side} is below the SSIM window; use at least {WINDOW}")
        scales = sum(side >> i >= WINDOW for i in range(len(self.SCALE_WEIGHTS)))
        weights = torch.tensor(self.SCALE_WEIGHTS[:scales]) / sum(self.SCALE_WEIGHTS[:scales])
        similarity = torch.ones(len(a), device=a.device)
        for i, weight in enumerate(weights.tolist()):
            luminance, contrast = ssim_terms(a, b, self.window)  # [B, 3, h, w]
            value = contrast * luminance if i == scales - 1 else contrast
            similarity = similarity * value.mean(dim=(1, 2, 3)).clamp(min=1e-3) ** weight
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        return 1.0 - similarity


class FocalFrequency(nn.Module):
    """Squared error of spectra, with higher weights for frequencies with larger errors (Jiang et al. 2021, eq. 8)."""

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        error = torch.fft.rfft2((reconstructions - images).float(), norm="ortho").abs().square()  # [B, 3, H, W/2 + 1]
        weight = error.detach().sqrt()
        weight = weight / weight.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
        return (weight * error).mean(dim=(1, 2, 3))


PERCEPTUAL: dict[str, Callable[[PerceptualConfig], nn.Module | None]] = {
    "none": lambda config: None,
    "lpips": lambda config: LPIPS.load(config.vgg, config.lpips),
    "ssim": lambda config: MultiScaleSSIM(),
    "focal_frequency": lambda config: FocalFrequency(),
    "features": lambda config: FeatureDistance(FeatureNetwork(config.features)),  # untrained, see train_features
}


def make_perceptual(config: PerceptualConfig) -> nn.Module | None:
    """Make the distance of a config. The kind "features" must then be trained by `train_features`, or loaded.

    Raises:
        ValueError: the kind is unknown.
        FileNotFoundError: LPIPS's weights are missing.
    """
    if config.kind not in PERCEPTUAL:
        raise ValueError(f"perceptual distance {config.kind!r} is unknown; use one of {', '.join(PERCEPTUAL)}")
    return PERCEPTUAL[config.kind](config)
