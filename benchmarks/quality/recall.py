"""Prompt recall: whether the nearest reference to a generated image is the one that its prompt describes.

There are R references and one query per prompt. An image is a feature vector; distance is the mean squared difference.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """A proportion of n trials with its 95 % confidence interval (Wilson 1927)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recall:
    """Recall at 1 and at 5, and the median rank of the right reference."""

    at_1: Share
    at_5: Share
    median_rank: float


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each of Q images."""

    distance: Tensor  # [Q], root mean squared difference in 8-bit gray levels
    index: Tensor  # [Q]
    ratio: Tensor  # [Q], the distance, relative to the mean distance of the nearest 50


def small_rgb(images: Tensor, side: int = 16) -> Tensor:
    """Downsample images [B, 3, H, W] in [-1, 1] to side x side pixels by area: [B, 3 * side * side]."""
    return F.interpolate(images.float(), size=(side, side), mode="area").flatten(1)


def distances(queries: Tensor, references: Tensor) -> Tensor:
    """Return the mean squared differences between features [Q, d] and [R, d]: [Q, R]."""
    # the faster mode, through a matrix product, loses the small distances to rounding
    root = torch.cdist(queries, references, compute_mode="donot_use_mm_for_euclid_dist")
    return root.square() / queries.shape[1]


def ranks(distance: Tensor, right: Tensor) -> Tensor:
    """Return the rank of the right reference of each query among all references, from 1: [Q].

    Args:
        distance: [Q, R].
        right: [Q], index of the right reference. What is exactly as near counts as nearer, so a tie earns nothing.
    """
    right_distance = distance.gather(1, right[:, None])  # [Q, 1]
    return (distance <= right_distance).sum(dim=1)


def share(hits: int, trials: int, z: float = 1.96) -> Share:
    """Return hits / trials with Wilson's score interval, which is accurate near 0 and 1, too."""
    p, spread = hits / trials, z * z / trials
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / trials + spread / (4 * trials)) / (1 + spread)
    return Share(p, max(0.0, middle - half), min(1.0, middle + half))


def recall(queries: Tensor, references: Tensor, right: Tensor) -> Recall:
    """Return the recall of queries [Q, d] among references [R, d]; chance is 1 / R at 1 and 5 / R at 5."""
    places = ranks(distances(queries, references), right).tolist()
    at_1, at_5 = (share(sum(place <= k for place in places), len(places)) for k in (1, 5))
    return Recall(at_1, at_5, statistics.median(places))


def nearest(queries: Tensor, training: Tensor, itself: Tensor | None = None, around: int = 50) -> Nearest:
    """Find the nearest training image of each query.

    Args:
        queries: features [Q, d] of images in [-1, 1].
        training: features [N, d].
        itself: [Q], for queries that are training pictures: their own index, which is ignored.
        around: how many of the nearest make up the neighborhood that the nearest is compared with (Carlini et al. 2023,
            eq. 2): a pale picture is near to many, a copy to one.
    """
    distance = distances(queries, training)
    if itself is not None:
        distance.scatter_(1, itself[:, None], math.inf)
    squared, indices = distance.topk(min(around, len(training) - 1), largest=False)  # [Q, around]
    root = squared.sqrt()
    return Nearest(root[:, 0] * 127.5, indices[:, 0], root[:, 0] / root.mean(dim=1).clamp(min=1e-12))
