"""Hints: dense images that are aligned with the picture, made from a training image or from a user's files.

`HINTS[kind](config)` contains no network and can be pickled for the workers of a data loader. Its attributes are
`channels` (the number of channels k), `needs_map` (training requires maps), `has_noise_level` (the last channel is a
noise level), `reads` (fields of `Files` that a user may pass) and `factor` (picture sides / image sides).

    hint(image, map, generator) -> [k, H, W]                       from a training image [3, H, W] and its map [1, H, W]
    hint.of_files(files, height, width, generator) -> [1, k, H, W]     from a user's files

| kind | channels k | made in training from | made from a user's |
|---|---|---|---|
| semantic | 1: class numbers | map | map |
| inpainting | 4: the image without the masked pixels, and the mask | image, random mask | image, mask |
| low_resolution | 3: the enlarged small image; 1 more for the noise level | image | image, noise_level |
| depth | 1: any scale, larger is nearer | map | map |
| edges | 1: strength of edges | image, or map if present | map, else image |
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conditioning.hints.degradation import ROUNDS, DegradationConfig, degrade
from conditioning.hints.hint_files import Files, fitted, required
from conditioning.hints.masks import CONVENTIONS, MaskConfig, draw_mask

VOID = 255  # in semantic maps: pixels without a class


@dataclass(frozen=True, kw_only=True)
class SpatialConfig:
    """Which dense image a model reads in addition to z_t, and how it is encoded.

    Raises:
        ValueError: An option is invalid.
    """

    kind: str  # a key of HINTS: semantic | inpainting | low_resolution | depth | edges
    downsampling: int = 8  # pixels per latent along a side, equal to the autoencoder's; 1 for a model of pixels
    drop: bool = False  # caption dropout drops the hint too, so guidance strengthens it
    classes: int = 182  # semantic: number of classes in the maps; other numbers are ignored
    channels: int = 3  # semantic: output channels of the trained 1x1 convolution
    latent_channels: int = 4  # inpainting: latent channels of the autoencoder
    convention: str = "stable_diffusion"  # inpainting: a key of CONVENTIONS, stable_diffusion | ldm
    noise: float = 0.0  # low_resolution: maximum noise in training, 0 to 1; above 0 the UNet reads the noise level
    masks: MaskConfig = field(default_factory=MaskConfig)  # inpainting: random masks in training
    degradation: DegradationConfig = field(default_factory=DegradationConfig)  # low_resolution: in training

    def __post_init__(self) -> None:
        for name, value, choices in (("kind", self.kind, HINTS), ("convention", self.convention, CONVENTIONS)):
            if value not in choices:
                raise ValueError(f"spatial.{name} {value!r} is unknown; use one of {', '.join(choices)}")
        for name in ("downsampling", "classes", "channels", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"spatial.{name} {getattr(self, name)} must be at least 1")
        if self.kind == "semantic" and self.downsampling & (self.downsampling - 1):
            raise ValueError(
                f"spatial.downsampling {self.downsampling} must be a power of 2, because maps are halved to latents"
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"spatial.noise {self.noise} must be between 0 (no noise) and 1 (only noise)")
        factor = self.degradation.factor
        if self.kind == "low_resolution" and self.downsampling > factor:
            raise ValueError(
                f"spatial.degradation.factor {factor} is less than spatial.downsampling {self.downsampling}, so the "
                f"small image would have more pixels than the latents; use a factor of {self.downsampling} or more"
            )


@dataclass(frozen=True)
class SemanticHint:
    """A map of class numbers, [1, H, W]."""

    config: SpatialConfig
    channels, has_noise_level, needs_map = 1, False, True
    reads, factor = frozenset({"map"}), 1
    command = ("stipple", "sample", "--map", "MAP.png")
    called, mode = "a semantic map", "nearest-exact"  # name in messages, and interpolation mode

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the map. Raises ValueError if there is none."""
        return required(map, self.called, "data.maps=FOLDER")

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return the map at H x W, [1, 1, H, W]. Raises ValueError if there is none, or it has no valid class."""
        map = required(files.map, self.called, "a map")
        self.check(map)
        return fitted(map, height, width, self.mode)[None]

    def check(self, map: Tensor) -> None:
        """Raise ValueError for a map without any class of the model; warn of numbers that are not classes."""
        numbers, most = map.round().unique(), self.config.classes - 1
        valid = (numbers >= 0) & (numbers <= most)
        invalid = ", ".join(f"{number:g}" for number in numbers[~valid & (numbers != VOID)][:5].tolist())
        fix = f"use numbers from 0 to {most}, the classes of the model"
        if not valid.any():
            raise ValueError(f"the map has no class in it, its numbers are {invalid or VOID}; {fix}")
        if invalid:
            warnings.warn(f"the map has numbers that are not classes: {invalid}; {fix}", stacklevel=2)


@dataclass(frozen=True)
class InpaintingHint:
    """An image without its masked pixels, and the mask, [4, H, W]."""

    config: SpatialConfig
    channels, has_noise_level, needs_map = 4, False, False
    reads, factor = frozenset({"image", "mask"}), 1
    command = ("stipple", "inpaint", "IMAGE.png", "MASK.png")

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the image with a random mask."""
        return self._masked(image, draw_mask(*image.shape[1:], self.config.masks, generator))

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return image and mask at H x W, [1, 4, H, W]. Raises ValueError if one of them is missing."""
        image = fitted(required(files.image, "an image to inpaint", "an image"), height, width)
        mask = fitted(required(files.mask, "a mask of the pixels to paint", "a mask"), height, width)
        return self._masked(image, (mask > 0.5).float())[None]

    def _masked(self, image: Tensor, mask: Tensor) -> Tensor:
        hole = CONVENTIONS[self.config.convention].hole
        return torch.cat([torch.where(mask > 0, hole, image), mask])  # [4, H, W]


@dataclass(frozen=True)
class LowResolutionHint:
    """A small image enlarged to H x W, with optional noise (Saharia et al. 2021, SR3; Saharia et al. 2022, Imagen).

    For models of pixels it is enlarged by bicubic interpolation, as in these papers. For models of latents each of its
    pixels is repeated, so that area means restore them (LDM's bsr_sr has one latent per pixel of the small image).
    """

    config: SpatialConfig
    needs_map = False
    reads = frozenset({"image", "noise_level"})
    command = ("stipple", "upscale", "IMAGE.png")

    @property
    def factor(self) -> int:
        """How many times larger than the image the picture is."""
        return self.config.degradation.factor

    @property
    def back_projection(self) -> int:
        """Default rounds of back-projection: 0 if the images that the model was trained on are blurred or noisy."""
        return ROUNDS if self.config.degradation.kind == "bicubic" else 0

    @property
    def has_noise_level(self) -> bool:
        """Whether the last channel is the noise level."""
        return self.config.noise > 0

    @property
    def channels(self) -> int:
        """3, or 4 with the noise level."""
        return 3 + self.has_noise_level

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """Degrade the image as configured, and add noise with a level drawn uniformly."""
        small = degrade(image, self.config.degradation, generator)
        level = self.config.noise * torch.rand((), generator=generator).item()
        return self._enlarged(small, image.shape[1], image.shape[2], level, generator)

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return the hint of the image, which is scaled to the low resolution if needed. Raises ValueError."""
        if not 0 <= files.noise_level <= self.config.noise:
            fix = f"use 0 to {self.config.noise}" if self.has_noise_level else "leave it out"
            raise ValueError(f"noise level {files.noise_level} exceeds that of this model's training; {fix}")
        image, factor = required(files.image, "an image to enlarge", "an image"), self.config.degradation.factor
        small = fitted(image, math.ceil(height / factor), math.ceil(width / factor))
        return self._enlarged(small, height, width, files.noise_level, generator)[None]

    def _enlarged(self, small: Tensor, height: int, width: int, level: float, generator: torch.Generator) -> Tensor:
        if self.has_noise_level:
            noise = torch.randn(small.shape, generator=generator)
            small = math.cos(level * math.pi / 2) * small + math.sin(level * math.pi / 2) * noise
        if self.config.downsampling == 1:
            large = F.interpolate(small[None], size=(height, width), mode="bicubic")[0]
        else:
            large = F.interpolate(small[None], size=(height, width), mode="nearest-exact")[0]
        return torch.cat([large, torch.full((1, height, width), level)]) if self.has_noise_level else large


@dataclass(frozen=True)
class DepthHint(SemanticHint):
    """A map of depths, or of any other quantity that can be interpolated, [1, H, W]."""

    called, mode = "a depth map", "bicubic"

    def check(self, map: Tensor) -> None:
        """Do nothing: a depth map may contain any numbers."""


@dataclass(frozen=True)
class EdgesHint:
    """Edges, [1, H, W]: a map, or the length of the gradient of the brightness (Sobel)."""

    config: SpatialConfig
    channels, has_noise_level, needs_map = 1, False, False
    reads, factor = frozenset({"map", "image"}), 1
    command = ("stipple", "sample", "--image", "IMAGE.png")

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return the map, or the edges of the image if there is no map."""
        return edges(image) if map is None else map

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return the map, else the edges of the image, at H x W. Raises ValueError if both are missing."""
        if files.map is not None:
            return fitted(files.map, height, width)[None]
        return edges(fitted(required(files.image, "edges", "a map or an image"), height, width))[None]


HINTS: dict[str, Any] = {
    "semantic": SemanticHint,
    "inpainting": InpaintingHint,
    "low_resolution": LowResolutionHint,
    "depth": DepthHint,
    "edges": EdgesHint,
}


def edges(image: Tensor) -> Tensor:
    """Return the gradient length of the brightness, by Sobel's filter: [3, H, W] -> [1, H, W]."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    gray = F.pad(image.mean(0)[None, None], (1, 1, 1, 1), mode="replicate")  # [1, 1, H + 2, W + 2]
    return F.conv2d(gray, torch.stack([across, across.T])[:, None])[0].square().sum(0, keepdim=True).sqrt()
