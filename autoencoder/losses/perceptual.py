"""Distances between images and reconstructions that see more than pixels; LPIPS, and substitutes that need no download.

All are called with images and reconstructions [B, 3, H, W] in [-1, 1], give [B], and have gradients in the second.
Feature matching with the discriminator, a further substitute, is in `losses`. docs/perceptual.md has them measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.losses.lpips import LPIPS
from autoencoder.losses.trained_features import FeatureConfig, FeatureDistance, FeatureNetwork


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """Which perceptual distance, and what it needs."""

    kind: str = "features"  # a key of PERCEPTUAL
    vgg: str | None = None  # lpips: file with torchvision's VGG16 weights
    lpips: str | None = None  # lpips: file with the official linear weights
    features: FeatureConfig = field(default_factory=FeatureConfig)  # features: the network and its training


class MultiScaleSSIM(nn.Module):
    """1 - MS-SSIM (Wang et al. 2003, eq. 7), over as many of the five scales as the image has room for.

    Raises:
        ValueError: a side of the images is shorter than the window, 11 pixels.
    """

    SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    WINDOW, SIGMA = 11, 1.5
    C1, C2 = 0.01**2, 0.03**2

    def __init__(self):
        super().__init__()
        window = torch.exp(-0.5 * ((torch.arange(self.WINDOW) - self.WINDOW // 2) / self.SIGMA).square())
        self.register_buffer("window", window / window.sum(), persistent=False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        a, b = (images.float() + 1) / 2, (reconstructions.float() + 1) / 2  # SSIM is defined on [0, 1]
        side = min(a.shape[-2:])
        if side < self.WINDOW:
            raise ValueError(f"image size {side} is below the SSIM window; use at least {self.WINDOW}")
        scales = sum(side >> i >= self.WINDOW for i in range(len(self.SCALE_WEIGHTS)))
        weights = torch.tensor(self.SCALE_WEIGHTS[:scales]) / sum(self.SCALE_WEIGHTS[:scales])
        similarity = torch.ones(len(a), device=a.device)
        for i, weight in enumerate(weights.tolist()):
            luminance, contrast = self._compare(a, b)  # [B, 3, h, w]
            value = contrast * luminance if i == scales - 1 else contrast
            similarity = similarity * value.mean(dim=(1, 2, 3)).clamp(min=1e-3) ** weight
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        return 1.0 - similarity

    def _compare(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        mean_a, mean_b = self._smooth(a), self._smooth(b)
        variance_a = self._smooth(a * a) - mean_a.square()
        variance_b = self._smooth(b * b) - mean_b.square()
        covariance = self._smooth(a * b) - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + self.C1) / (mean_a.square() + mean_b.square() + self.C1)
        return luminance, (2 * covariance + self.C2) / (variance_a + variance_b + self.C2)

    def _smooth(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        rows = self.window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        with torch.autocast(x.device.type, enabled=False):  # a variance is a small difference of large numbers
            return F.conv2d(F.conv2d(x, rows, groups=channels), rows.transpose(2, 3), groups=channels)


class FocalFrequency(nn.Module):
    """Error of the spectrum, weighted so that badly matched frequencies count more (Jiang et al. 2021, eq. 8)."""

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
    "features": lambda config: FeatureDistance(FeatureNetwork(config.features)),  # untrained: see train_features
}


def make_perceptual(config: PerceptualConfig) -> nn.Module | None:
    """The distance that the config names; one of kind "features" must then be trained (`train_features`) or loaded.

    Raises:
        ValueError: the kind is unknown.
        FileNotFoundError: LPIPS without its weights.
    """
    if config.kind not in PERCEPTUAL:
        raise ValueError(f"perceptual distance {config.kind!r} is unknown; use one of {', '.join(PERCEPTUAL)}")
    return PERCEPTUAL[config.kind](config)
