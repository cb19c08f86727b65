"""LPIPS: a weighted distance between features of VGG16, with the official weights (Zhang et al. 2018, section 3)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

# VGG16's 3x3 convolutions by stage: index in torchvision's `features`, channels in and out; max-pooling between stages
VGG16_STAGES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
IMAGE_MEAN = (-0.030, -0.088, -0.188)  # of ImageNet, for images in [-1, 1], as in the official code
IMAGE_STD = (0.458, 0.448, 0.450)
SOURCES = {
    "VGG16": "vgg16-397923af.pth, which torchvision.models.vgg16(weights='IMAGENET1K_V1') downloads",
    "LPIPS": "lpips/weights/v0.1/vgg.pth of github.com/richzhang/PerceptualSimilarity",
}


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015) with torchvision's names, without the classifier."""

    def __init__(self):
        super().__init__()
        convolutions = [layer for stage in VGG16_STAGES for layer in stage]
        self.features = nn.ModuleDict({str(i): nn.Conv2d(a, b, 3, padding=1) for i, a, b in convolutions})

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the last activations of the stages, [B, C, H / 2^i, W / 2^i], of normalized images [B, 3, H, W]."""
        x, activations = images, []
        for i, stage in enumerate(VGG16_STAGES):
            x = nn.functional.max_pool2d(x, 2) if i else x
            for index, _, _ in stage:
                x = self.features[str(index)](x).relu()
            activations.append(x)
        return activations


def unit_difference(features: Tensor, others: Tensor) -> Tensor:
    """Squared difference of features normalized at each position, for each channel: [B, C, H, W], float32."""
    a, b = features.float(), others.float()
    a = a * (a.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()
    b = b * (b.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()
    return (a - b).square()


class LPIPS(nn.Module):
    """Perceptual distance [B] of images and reconstructions [B, 3, H, W] in [-1, 1], with frozen weights."""

    def __init__(self):
        super().__init__()
        self.vgg = VGG16()
        widths = [stage[-1][2] for stage in VGG16_STAGES]
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(1, width, 1, 1)) for width in widths)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, vgg: str | None, linear: str | None) -> LPIPS:
        """Load weights from two local files: torchvision's VGG16 and the official linear layers.

        Raises:
            FileNotFoundError: a path is None or not a file. The message tells where to get the file.
            ValueError: a file contains other weights.
        """
        lpips = cls()
        weights = {k: v for k, v in _read(vgg, "VGG16").items() if k.startswith("features.")}
        linear_weights = _read(linear, "LPIPS")
        try:
            lpips.vgg.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{vgg} does not contain VGG16: {reason}; use {SOURCES['VGG16']}") from error
        for i, weight in enumerate(lpips.weights):
            name = f"lin{i}.model.1.weight"
            if name not in linear_weights or linear_weights[name].shape != weight.shape:
                raise ValueError(
                    f"{linear} does not contain {name} of shape {list(weight.shape)}; use {SOURCES['LPIPS']}"
                )
            weight.copy_(linear_weights[name])
        return lpips

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        features = self.vgg((reconstructions - self.mean) / self.std)
        with torch.no_grad():
            image_features = self.vgg((images - self.mean) / self.std)
        pairs = zip(self.weights, features, image_features, strict=True)
        distances = [(weight * unit_difference(a, b)).sum(dim=1).mean(dim=(1, 2)) for weight, a, b in pairs]
        return torch.stack(distances).sum(dim=0)  # [B]


def _read(path: str | None, what: str) -> dict[str, Tensor]:
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(f"LPIPS needs the {what} weights, and {path} is not a file; get {SOURCES[what]}")
    return torch.load(path, map_location="cpu", weights_only=True)
