"""The linear autoencoder of some pictures: principal components on the way down, least squares on the way up.

It has the shape of the networks of `autoencoder.networks`, level by level, and is what `linear_start` writes into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # pictures whose patches are held at once
RIDGE = 1e-6  # added to the mean squares of a least-squares fit, relative to their mean
SMALLEST = 1e-3  # standard deviations below this share of the largest count as this share
BALANCE = 0.5  # how far components are brought to the size of the first: 0 not at all, 1 to the same deviation


@dataclass(frozen=True)
class Affine:
    """A convolution with bias."""

    weight: Tensor  # [m, n, k, k]
    bias: Tensor  # [m]


@dataclass(frozen=True)
class LinearAutoencoder:
    """Convolutions alone, from images to latents of mean 0 and variance 1, and back."""

    center: Affine  # 1x1: images minus their mean color
    down: tuple[Affine, ...]  # each 2x2 with stride 2: components of the four pixels of a cell
    to_latents: Affine  # 1x1
    from_latents: Affine  # 3x3: to the components of the lowest level
    up: tuple[Affine, ...]  # each 3x3 after doubling by repeating pixels; the last gives images minus their mean color

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> latents [B, c, H/f, W/f]."""
        x = F.conv2d(images, self.center.weight, self.center.bias)
        for step in self.down:
            x = halved(x, step)
        return F.conv2d(x, self.to_latents.weight, self.to_latents.bias)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> images [B, C, f h, f w]."""
        x = F.conv2d(latents, self.from_latents.weight, self.from_latents.bias, padding=1)
        for step in self.up:
            x = doubled(x, step)
        return x - self.center.bias[:, None, None]


def halved(x: Tensor, step: Affine) -> Tensor:
    """[B, n, H, W] -> [B, m, H/2, W/2]."""
    return F.conv2d(x, step.weight, step.bias, stride=2)


def doubled(x: Tensor, step: Affine) -> Tensor:
    """[B, n, h, w] -> [B, m, 2h, 2w]."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), step.weight, step.bias, padding=1)


@torch.no_grad()
def fit(images: Tensor, widths: Sequence[int], latent_channels: int) -> LinearAutoencoder:
    """The linear autoencoder of images [N, C, H, W] that has at most widths[i] features at level i.

    Encoder: at each level the principal components of a cell's four pixels. Decoder: at each level the 3x3 convolution
    that comes nearest to the encoder's features of that level, in mean squares, from what the decoder has.

    Args:
        images: to fit, in [-1, 1].
        widths: of each level, finest first; f = 2 ** (len(widths) - 1).
        latent_channels: c; where there are fewer components, the rest is zero.

    Raises:
        ValueError: the images are all alike.
    """
    color = images.mean(dim=(0, 2, 3))
    center = Affine(torch.eye(len(color))[:, :, None, None], -color)
    features, down, scales = _descend(images - color[:, None, None], widths)
    weight, bias, deviations = components((features[-1] / scales[:, None, None]).flatten(2), latent_channels)
    missing = (0, latent_channels - len(weight))
    weight = F.pad(weight / deviations[:, None] / scales, (0, 0, *missing))
    to_latents = Affine(weight[:, :, None, None], F.pad(bias / deviations, missing))
    latents = F.conv2d(features[-1], to_latents.weight, to_latents.bias)
    from_latents = regression(latents, features[-1])
    x, up = F.conv2d(latents, from_latents.weight, from_latents.bias, padding=1), []
    for target in features[-2::-1]:
        up.append(regression(F.interpolate(x, scale_factor=2.0, mode="nearest"), target))
        x = doubled(x, up[-1])
    return LinearAutoencoder(center, down, to_latents, from_latents, tuple(up))


def _descend(x: Tensor, widths: Sequence[int]) -> tuple[list[Tensor], tuple[Affine, ...], Tensor]:
    """The encoder's features at each level, the steps between them, and the scales of the last features, [m].

    Features are principal components times scales (BALANCE); which components there are does not depend on scales.
    """
    features, down, scales = [x], [], torch.ones(x.shape[1])
    for width in widths[1:]:
        x, scales_before = features[-1], scales
        weight, bias, deviations = components(F.unfold(x / scales[:, None, None], 2, stride=2), width)
        weight, bias, deviations = weight / 2, bias / 2, deviations / 2  # of four equal pixels: as each of them
        scales = (deviations / deviations[0]) ** -BALANCE
        weight = weight.unflatten(1, (x.shape[1], 2, 2)) / scales_before[:, None, None] * scales[:, None, None, None]
        down.append(Affine(weight, bias * scales))
        features.append(halved(x, down[-1]))
    return features, tuple(down), scales


def components(vectors: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first principal components of vectors [N, d, places]: weight [m, d], bias [m], standard deviations [m].

    m is at most `most`. Standard deviations are at least SMALLEST times the first.
    """
    d = vectors.shape[1]
    flat = vectors.transpose(0, 1).reshape(d, -1)
    mean = flat.double().mean(1)
    centered = flat - mean.float()[:, None]
    values, basis = torch.linalg.eigh((centered @ centered.T).double() / flat.shape[1])  # ascending
    values, basis = values.flip(0)[:most].clamp(min=0), basis.flip(1)[:, :most].T  # [m], [m, d]
    if values[0] <= 1e-12:
        raise ValueError("a linear start needs pictures that differ, and these are all of one color")
    deviations = values.sqrt().clamp(min=SMALLEST * values[0].sqrt().item())
    return basis.float(), -(basis @ mean).float(), deviations.float()


def regression(x: Tensor, target: Tensor) -> Affine:
    """The 3x3 convolution of x [N, n, H, W], padded by 1, that is nearest to target [N, m, H, W] in mean squares."""
    n, m = x.shape[1], target.shape[1]
    squares = torch.zeros(9 * n + 1, 9 * n + 1, dtype=torch.float64)
    products = torch.zeros(9 * n + 1, m, dtype=torch.float64)
    for some, wanted in zip(x.split(CHUNK), target.split(CHUNK), strict=True):
        patches = F.pad(F.unfold(some, 3, padding=1).transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)  # [places, 9n+1]
        squares += patches.T @ patches
        products += patches.T @ wanted.permute(0, 2, 3, 1).reshape(-1, m)
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    solution = torch.linalg.solve(squares, products).float()  # [9n+1, m]
    return Affine(solution[:-1].T.reshape(m, n, 3, 3), solution[-1])
