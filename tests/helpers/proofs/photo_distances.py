"""Distances of images by features of a small network that is trained on crops of photographs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from autoencoder.losses.trained_features import FeatureConfig, FeatureDistance, FeatureNetwork, train_features
from stipple_core.images.images import image_to_tensor

CONFIG = FeatureConfig(steps=250, batch_size=24)


def crops(folder: Path, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield endless batches [B, 3, 32, 32] of the images in a folder."""
    paths = sorted(folder.glob("*.png"))
    while True:
        chosen = torch.randint(len(paths), (CONFIG.batch_size,), generator=generator).tolist()
        yield torch.stack([image_to_tensor(Image.open(paths[index])) for index in chosen])


def train_distance(folder: Path) -> FeatureDistance:
    """Train a perceptual distance on the images in a folder."""
    generator = torch.Generator().manual_seed(0)
    network = FeatureNetwork(CONFIG)
    train_features(network, crops(folder, generator), CONFIG, generator)
    return FeatureDistance(network)


@torch.no_grad()
def frechet(distance: FeatureDistance, images: Tensor, others: Tensor) -> float:
    """The Frechet distance of two sets of images, of Gaussians fitted to features at all positions of stages 2 and 3.

    Like FID (Heusel et al. 2017), but with local features: the sets are small, and photographs differ from upscaled
    images in texture.
    """
    total = 0.0
    for stage in (1, 2):
        fits = []
        for batch in (images, others):
            features = torch.cat([distance.network(one)[stage] for one in batch.split(8)])
            points = features.movedim(1, -1).flatten(0, 2).double().numpy()  # [places, C]
            fits.append((points.mean(0), np.cov(points.T)))
        (mean, cov), (other_mean, other_cov) = fits
        root = sqrtm(cov @ other_cov).real
        total += ((mean - other_mean) ** 2).sum() + np.trace(cov + other_cov - 2 * root)
    return float(total)
