"""Masks of inpainting: how training draws them (Suvorov et al. 2022, LaMa), and how models encode them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How an inpainting model encodes a masked image."""

    mask_first: bool  # the mask channel precedes the latents of the image
    hole: float  # value of masked pixels in the image
    unmasked: float  # value of the mask where the image is kept
    masked: float  # value of the mask where the image is painted


CONVENTIONS = {
    "stable_diffusion": Convention(mask_first=True, hole=0.0, unmasked=0.0, masked=1.0),
    "ldm": Convention(mask_first=False, hole=-1.0, unmasked=-1.0, masked=1.0),  # LDM's inpaint.py: 2 x - 1
}


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Random masks in training; lengths are relative to the shorter side.

    Raises:
        ValueError: An option is invalid.
    """

    boxes: float = 0.45  # relative frequency of masks made of boxes
    strokes: float = 0.45  # relative frequency of masks made of brush strokes
    whole: float = 0.1  # relative frequency of masks of everything, so that the model also draws without an image
    count: int = 4  # maximum number of boxes or strokes in a mask
    box: tuple[float, float] = (0.15, 0.6)  # minimum and maximum side of a box
    brush: tuple[float, float] = (0.05, 0.2)  # minimum and maximum width of a stroke
    corners: int = 6  # maximum number of segments of a stroke

    def __post_init__(self) -> None:
        shares = [getattr(self, name) for name in MASKS]
        if min(shares) < 0 or not 0 < sum(shares) < math.inf:
            raise ValueError(
                f"masks: {', '.join(MASKS)} are {shares}; they must be at least 0, and one of them above 0"
            )
        for name in ("box", "brush"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"masks.{name} {[low, high]} must be [minimum, maximum] with 0 < minimum <= maximum <= 1"
                )
        if self.count < 1 or self.corners < 1:
            raise ValueError(f"masks.count {self.count} and masks.corners {self.corners} must be at least 1")


def draw_mask(height: int, width: int, config: MaskConfig, generator: torch.Generator) -> Tensor:
    """Return a mask [1, H, W] of zeros and ones, 1 where the image is hidden; it hides at least one pixel."""
    shares = torch.tensor([getattr(config, name) for name in MASKS], dtype=torch.float64)
    kind = list(MASKS)[int(torch.multinomial(shares, 1, generator=generator))]
    return MASKS[kind](height, width, config, generator)


def _boxes(height: int, width: int, config: MaskConfig, generator: torch.Generator) -> Tensor:
    mask, short = torch.zeros(1, height, width), min(height, width)
    for _ in range(_whole_number(1, config.count, generator)):
        h, w = (max(round(short * _between(*config.box, generator)), 1) for _ in range(2))
        top, left = _whole_number(0, height - h, generator), _whole_number(0, width - w, generator)
        mask[:, top : top + h, left : left + w] = 1
    return mask


def _strokes(height: int, width: int, config: MaskConfig, generator: torch.Generator) -> Tensor:
    """Draw lines with round ends that turn by at most 90 degrees at each corner."""
    image, short = Image.new("L", (width, height)), min(height, width)
    draw = ImageDraw.Draw(image)
    for _ in range(_whole_number(1, config.count, generator)):
        brush = max(round(short * _between(*config.brush, generator)), 1)
        x, y = width * _between(0, 1, generator), height * _between(0, 1, generator)
        angle = _between(0, 2 * math.pi, generator)
        for _ in range(_whole_number(1, config.corners, generator)):
            length = short * _between(0.1, 0.4, generator)
            ahead = x + length * math.cos(angle), y + length * math.sin(angle)
            ahead = min(max(ahead[0], 0), width - 1), min(max(ahead[1], 0), height - 1)
            draw.line([(x, y), ahead], fill=255, width=brush)
            for cx, cy in ((x, y), ahead):
                draw.ellipse([cx - brush / 2, cy - brush / 2, cx + brush / 2, cy + brush / 2], fill=255)
            (x, y), angle = ahead, angle + _between(-math.pi / 2, math.pi / 2, generator)
    rows = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return (rows.view(1, height, width) > 0).float()


def _whole(height: int, width: int, config: MaskConfig, generator: torch.Generator) -> Tensor:
    return torch.ones(1, height, width)


MASKS: dict[str, Callable[[int, int, MaskConfig, torch.Generator], Tensor]] = {
    "boxes": _boxes,
    "strokes": _strokes,
    "whole": _whole,
}


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _whole_number(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer from low to high, inclusive; low if high is less."""
    return int(torch.randint(low, max(high, low) + 1, (), generator=generator))
