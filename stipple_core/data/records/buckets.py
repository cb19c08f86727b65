"""Aspect-ratio buckets: pictures of like shape are trained on together, instead of all cut to one square.

A bucket is a width and a height, multiples of a step, with at most the square's pixels. A picture belongs to the
bucket of the nearest aspect ratio; it is resized until it covers the bucket, and what stands over is cropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Which shapes there are besides the square of `data.image_size`."""

    step: int = 64  # pixels; sides are multiples of it
    max_aspect: float = 2.0  # of long to short side; more extreme pictures are cropped to it

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"data.buckets.step {self.step} must be at least 1 pixel; use 64")
        if not 1 <= self.max_aspect < math.inf:
            raise ValueError(f"data.buckets.max_aspect {self.max_aspect} is long over short side; use 1 or more")


@dataclass(frozen=True, slots=True)
class Buckets:
    """The bucket of each record."""

    shapes: list[tuple[int, int]]  # width and height
    of: np.ndarray  # [records] int16, numbers of shapes

    def shape(self, index: int) -> tuple[int, int]:
        """Width and height of a record's bucket."""
        return self.shapes[self.of[index]]


def bucket_shapes(image_size: int, config: BucketConfig) -> list[tuple[int, int]]:
    """Widths and heights: for each side the longest other side with no more pixels than the square, in order of width.

    Raises ValueError if the square is not one of them.
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
    """The bucket of the nearest aspect ratio, by its logarithm, for pictures of these widths and heights."""
    widths, heights = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    ratios = np.log([width / height for width, height in shapes])
    distances = np.abs(np.log(widths / heights)[:, None] - ratios)  # [records, shapes]
    return Buckets(list(shapes), distances.argmin(axis=1).astype(np.int16))


def check_step(config: BucketConfig | None, downsampling: int, what: str) -> None:
    """ValueError unless sides of buckets can be divided by `downsampling`, which is `what` needs."""
    if config is not None and config.step % downsampling:
        mend = math.ceil(config.step / downsampling) * downsampling
        raise ValueError(f"data.buckets.step {config.step} is not a multiple of {downsampling} ({what}); use {mend}")
