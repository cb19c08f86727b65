"""Hints: dense pictures of the same place as the one to be made, out of a training picture or of a user's files.

`HINTS[kind](config)` is small, holds no network and can be pickled, so that a loader's workers can call it. It says how
many channels k it has, whether training needs maps for it (needs_map), and whether its last channel is a noise level:

    hint(image, map, generator) -> [k, H, W]                  of a training picture [3, H, W] and its map [1, H, W]
    hint.of_files(files, height, width, generator) -> [1, k, H, W]     of what a user gives

| kind | channels k | made in training of | of the user's |
|---|---|---|---|
| semantic | 1: class numbers | map | map |
| inpainting | 4: the picture without what is missing, 1 where it is | image, a random mask | image, mask |
| low_resolution | 3: a small picture made large; with noise 1 more: its level | image | image, noise_level |
| depth | 1: any scale, larger is nearer | map | map |
| edges | 1: strength of edges | image, or map if given | map, else image |
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conditioning.hints.degradation import ROUNDS, degrade
from conditioning.hints.masks import draw_mask

if TYPE_CHECKING:
    from conditioning.readers.spatial import SpatialConfig


VOID = 255  # in maps of classes: what nobody has named


@dataclass(frozen=True, kw_only=True)
class Files:
    """What a user gives for a picture to be made of, read from files; sizes may differ from the picture's."""

    image: Tensor | None = None  # [3, h, w] in [-1, 1]
    mask: Tensor | None = None  # [1, h, w] from 0 to 1; above a half: to be made anew
    map: Tensor | None = None  # [1, h, w] class numbers, or depths or edges on any scale
    noise_level: float = 0.0  # added to a low-resolution image, 0 to 1


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How an inpainting model is told what is missing."""

    mask_first: bool  # the mask's channel comes before those of the picture's latents
    hole: float  # value of the picture's pixels where they are missing
    kept: float  # value of the mask there where the picture is to stay
    missing: float  # and where it is to be made


CONVENTIONS = {
    "stable_diffusion": Convention(mask_first=True, hole=0.0, kept=0.0, missing=1.0),
    "ldm": Convention(
        mask_first=False, hole=-1.0, kept=-1.0, missing=1.0
    ),  # LDM's stipple inpaint scales all by 2 x - 1
}


@dataclass(frozen=True)
class SemanticHint:
    """A map of class numbers, [1, H, W]."""

    config: SpatialConfig
    channels, has_noise_level, needs_map = 1, False, True
    reads, factor = frozenset({"map"}), 1
    command = ("stipple", "sample", "--map", "MAP.png")
    called, mode = "a semantic map", "nearest-exact"  # how it is named, and brought to size

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """The map itself. Raises ValueError where there is none."""
        return _required(map, self.called, "data.maps=FOLDER")

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The map, cut to size, [1, 1, H, W]. Raises ValueError where there is none, or nothing that is known in it."""
        told = _required(files.map, self.called, "a map")
        self.check(told)
        return fitted(told, height, width, self.mode)[None]

    def check(self, map: Tensor) -> None:
        """Raise ValueError for a map without a class that the model knows; warn of numbers that are of none."""
        numbers, most = map.round().unique(), self.config.classes - 1
        known = (numbers >= 0) & (numbers <= most)
        unknown = ", ".join(f"{number:g}" for number in numbers[~known & (numbers != VOID)][:5].tolist())
        mend = f"give numbers from 0 to {most}, the model's classes"
        if not known.any():
            raise ValueError(f"the map has no class in it, its numbers are {unknown or VOID}; {mend}")
        if unknown:
            warnings.warn(f"the map has numbers that are of no class: {unknown}; {mend}", stacklevel=2)


@dataclass(frozen=True)
class InpaintingHint:
    """A picture with a hole, and a mask that is 1 in it."""

    config: SpatialConfig
    channels, has_noise_level, needs_map = 4, False, False
    reads, factor = frozenset({"image", "mask"}), 1
    command = ("stipple", "inpaint", "IMAGE.png", "MASK.png")

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """With a mask that is drawn."""
        return self._masked(image, draw_mask(*image.shape[1:], self.config.masks, generator))

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Both, cut to size. Raises ValueError where one is missing."""
        image = fitted(_required(files.image, "a picture to be completed", "an image"), height, width)
        mask = fitted(_required(files.mask, "a mask of what is to be made", "a mask"), height, width)
        return self._masked(image, (mask > 0.5).float())[None]

    def _masked(self, image: Tensor, mask: Tensor) -> Tensor:
        hole = CONVENTIONS[self.config.convention].hole
        return torch.cat([torch.where(mask > 0, hole, image), mask])  # [4, H, W]


@dataclass(frozen=True)
class LowResolutionHint:
    """A small picture brought to H x W, with noise where the config wants it (Saharia et al. 2021, SR3; Imagen).

    For a model of pixels it is made large by bicubic interpolation, as there. For one of latents each of its pixels is
    repeated, so that means over areas find them again (LDM's bsr_sr, whose latents are as many as its pixels).
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
        """Rounds where nobody says how many: none for a model whose images may be blurred and noisy."""
        return ROUNDS if self.config.degradation.kind == "bicubic" else 0

    @property
    def has_noise_level(self) -> bool:
        """Whether the last channel is the level of the noise."""
        return self.config.noise > 0

    @property
    def channels(self) -> int:
        """3, and one more where the level of the noise is told."""
        return 3 + self.has_noise_level

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """Degraded as the config says, with a level that is drawn uniformly."""
        small = degrade(image, self.config.degradation, generator)
        level = self.config.noise * torch.rand((), generator=generator).item()
        return self._enlarged(small, image.shape[1], image.shape[2], level, generator)

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The image, brought to the size of low resolution if it is not of it. Raises ValueError."""
        if not 0 <= files.noise_level <= self.config.noise:
            most = f"use 0 to {self.config.noise}" if self.has_noise_level else "leave it out"
            raise ValueError(f"noise level {files.noise_level} is more than this model was trained with; {most}")
        image, factor = _required(files.image, "a picture to be enlarged", "an image"), self.config.degradation.factor
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
    """Depths, or anything else that is one number per pixel: a map that may be interpolated, [1, H, W]."""

    called, mode = "a map of depths", "bicubic"

    def check(self, map: Tensor) -> None:
        """Any number is a depth."""


@dataclass(frozen=True)
class EdgesHint:
    """Edges: given, or the length of the brightness' gradient (Sobel)."""

    config: SpatialConfig
    channels, has_noise_level, needs_map = 1, False, False
    reads, factor = frozenset({"map", "image"}), 1
    command = ("stipple", "sample", "--image", "IMAGE.png")

    def __call__(self, image: Tensor, map: Tensor | None, generator: torch.Generator) -> Tensor:
        """Those of the map, else of the picture."""
        return edges(image) if map is None else map

    def of_files(self, files: Files, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Those of the map, else of the image, cut to size. Raises ValueError where there is neither."""
        if files.map is not None:
            return fitted(files.map, height, width)[None]
        return edges(fitted(_required(files.image, "edges", "a map or an image"), height, width))[None]


HINTS: dict[str, Any] = {
    "semantic": SemanticHint,
    "inpainting": InpaintingHint,
    "low_resolution": LowResolutionHint,
    "depth": DepthHint,
    "edges": EdgesHint,
}


def edges(image: Tensor) -> Tensor:
    """Length of the gradient of the brightness of an image [3, H, W], [1, H, W] (Sobel's filter)."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    gray = F.pad(image.mean(0)[None, None], (1, 1, 1, 1), mode="replicate")  # [1, 1, H + 2, W + 2]
    return F.conv2d(gray, torch.stack([across, across.T])[:, None])[0].square().sum(0, keepdim=True).sqrt()


def fitted(x: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """A dense picture [k, h, w] made large or small enough to cover H x W, the middle of it [k, H, W]."""
    scale = max(height / x.shape[1], width / x.shape[2])
    size = [max(round(side * scale), wanted) for side, wanted in zip(x.shape[1:], (height, width), strict=True)]
    if size != list(x.shape[1:]):
        smooth = {"antialias": True} if mode in ("bilinear", "bicubic") else {}
        low, high = x.min(), x.max()
        x = F.interpolate(x[None], size=size, mode=mode, **smooth)[0].clamp(low, high)  # bicubic overshoots
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def _required(x: Tensor | None, what: str, mend: str) -> Tensor:
    if x is None:
        raise ValueError(f"this model is told {what}, and none is given; give {mend}")
    return x
