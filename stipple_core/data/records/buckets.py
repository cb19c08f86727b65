"""Aspect-ratio buckets: images of similar shape are batched together instead of cropping all to a square.

A bucket is a width and a height, both multiples of a step, with at most as many pixels as the square. An image belongs
to the bucket of the nearest aspect ratio. It is resized to cover the bucket, and the longer side is cropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """The shapes of buckets besides the square of `data.image_size`."""

    step: int = 64  # pixels; sides are multiples of it
    max_aspect: float = 2.0  # of long to short side; more extreme images are cropped to it

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"data.buckets.step {self.step} must be at least 1 pixel; use 64")
        if not 1 <= self.max_aspect < math.inf:
            raise ValueError(
                f"data.buckets.max_aspect {self.max_aspect} is the ratio of long to short side; use 1 or more"
            )


@dataclass(frozen=True, slots=True)
class Buckets:
    """The bucket of each record."""

    shapes: list[tuple[int, int]]  # width and height
    of: np.ndarray  # [records] int16, indices into `shapes`

    def shape(self, index: int) -> tuple[int, int]:
        """Width and height of a record's bucket."""
        return self.shapes[self.of[index]]


def bucket_shapes(image_size: int, config: BucketConfig) -> list[tuple[int, int]]:
    """Return widths and heights ordered by width: for each side the longest other side within the square's pixels.

    Raises:
        ValueError: the square is not one of them.
    """
    step = config.step
    if image_size % step:
        near = max(1, round(image_size / step)) * step
        raise ValueError(
            f"data.image_size {image_size} is not a multiple of data.buckets.step {step}; use image_size {near}, or a "
            "step that divides it"
        )
    shapes = set()
    for long in range(image_size, math.floor(image_size * math.sqrt(config.max_aspect)) + 2 * step, step):
        short = image_size**2 // long // step * step
        if short and long / short <= config.max_aspect:
            shapes |= {(long, short), (short, long)}
    return sorted(shapes)


def assign(sizes: Sequence[tuple[int, int]], shapes: Sequence[tuple[int, int]]) -> Buckets:
    """Assign images of these widths and heights to the buckets of the nearest logarithmic aspect ratios."""
    widths, heights = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    ratios = np.log([width / height for width, height in shapes])
    distances = np.abs(np.log(widths / heights)[:, None] - ratios)  # [records, shapes]
    return Buckets(list(shapes), distances.argmin(axis=1).astype(np.int16))


def check_step(config: BucketConfig | None, downsampling: int, what: str) -> None:
    """Raise a ValueError unless the sides of buckets are divisible by `downsampling`, as `what` requires."""
    if config is not None and config.step % downsampling:
        fix = math.ceil(config.step / downsampling) * downsampling
        raise ValueError(f"data.buckets.step {config.step} is not a multiple of {downsampling} ({what}); use {fix}")
