"""How near pictures are to photographs by the features of a small network that is trained on crops of photographs."""

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
    """Endless batches [B, 3, 32, 32] of the pictures in a folder."""
    paths = sorted(folder.glob("*.png"))
    while True:
        chosen = torch.randint(len(paths), (CONFIG.batch_size,), generator=generator).tolist()
        yield torch.stack([image_to_tensor(Image.open(paths[index])) for index in chosen])


def train_distance(folder: Path) -> FeatureDistance:
    """The distance [B] of two batches of pictures, by features trained on the pictures in a folder."""
    generator = torch.Generator().manual_seed(0)
    network = FeatureNetwork(CONFIG)
    train_features(network, crops(folder, generator), CONFIG, generator)
    return FeatureDistance(network)


@torch.no_grad()
def frechet(distance: FeatureDistance, images: Tensor, others: Tensor) -> float:
    """Frechet's distance of two sets of pictures: of Gaussians fitted to features at all places of stages 2 and 3.

    As FID (Heusel et al. 2017), but of what lies around a place, a quarter of the picture's resolution: the sets are
    small, and textures are what tells photographs from enlargements.
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
