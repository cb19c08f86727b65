"""The linear autoencoder of a set of images: an encoder of principal components, and a decoder of least squares.

It has the same levels as the networks of `autoencoder.networks`; `linear_start` writes it into their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # images whose patches are in memory at once
RIDGE = 1e-6  # added to the mean squares of a least-squares fit, relative to their mean
SMALLEST = 1e-3  # least standard deviation of a component, relative to that of the first one
BALANCE = 0.5  # how much components are scaled towards the deviation of the first: 0 not at all, 1 to the same one


@dataclass(frozen=True)
class Affine:
    """A convolution with bias."""

    weight: Tensor  # [m, n, k, k]
    bias: Tensor  # [m]


@dataclass(frozen=True)
class LinearAutoencoder:
    """Convolutions without activations: from images to latents of mean 0 and variance 1, and back."""

    center: Affine  # 1x1: images minus their mean color
    down: tuple[Affine, ...]  # each 2x2 with stride 2: components of the four pixels of a 2x2 cell
    to_latents: Affine  # 1x1
    from_latents: Affine  # 3x3: to the components of the lowest level
    up: tuple[Affine, ...]  # each 3x3 after nearest upsampling; the last returns images minus their mean color

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> latents [B, c, H/f, W/f]."""
        x = F.conv2d(images, self.center.weight, self.center.bias)
        for step in self.down:
            x = downsample(x, step)
        return F.conv2d(x, self.to_latents.weight, self.to_latents.bias)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> images [B, C, f h, f w]."""
        x = F.conv2d(latents, self.from_latents.weight, self.from_latents.bias, padding=1)
        for step in self.up:
            x = upsample(x, step)
        return x - self.center.bias[:, None, None]


def downsample(x: Tensor, step: Affine) -> Tensor:
    """Apply a step of the encoder: [B, n, H, W] -> [B, m, H/2, W/2]."""
    return F.conv2d(x, step.weight, step.bias, stride=2)


def upsample(x: Tensor, step: Affine) -> Tensor:
    """Apply a step of the decoder: [B, n, h, w] -> [B, m, 2h, 2w]."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), step.weight, step.bias, padding=1)


@torch.no_grad()
def fit(images: Tensor, widths: Sequence[int], latent_channels: int) -> LinearAutoencoder:
    """Fit the linear autoencoder of images [N, C, H, W] that has at most widths[i] features at level i.

    Each level of the encoder computes the principal components of the four pixels of a cell. Each level of the decoder
    is the 3x3 convolution of the decoder's features that has the least squared error to the encoder's features.

    Args:
        images: in [-1, 1].
        widths: of each level, finest first; f = 2 ** (len(widths) - 1).
        latent_channels: c. If there are fewer components, the remaining latents are zero.

    Raises:
        ValueError: all images have the same single color.
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
        x = upsample(x, up[-1])
    return LinearAutoencoder(center, down, to_latents, from_latents, tuple(up))


def _descend(x: Tensor, widths: Sequence[int]) -> tuple[list[Tensor], tuple[Affine, ...], Tensor]:
    """Return the encoder's features at each level, the steps between them, and the scales of the last features, [m].

    Features are principal components times scales (BALANCE). The components do not depend on the scales.
    """
    features, down, scales = [x], [], torch.ones(x.shape[1])
    for width in widths[1:]:
        x, scales_before = features[-1], scales
        weight, bias, deviations = components(F.unfold(x / scales[:, None, None], 2, stride=2), width)
        weight, bias, deviations = weight / 2, bias / 2, deviations / 2  # four equal pixels give their value
        scales = (deviations / deviations[0]) ** -BALANCE
        weight = weight.unflatten(1, (x.shape[1], 2, 2)) / scales_before[:, None, None] * scales[:, None, None, None]
        down.append(Affine(weight, bias * scales))
        features.append(downsample(x, down[-1]))
    return features, tuple(down), scales


def components(vectors: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first principal components of vectors [N, d, places]: weight [m, d], bias [m], deviations [m].

    m is at most `limit`. Standard deviations are at least SMALLEST times the first.
    """
    d = vectors.shape[1]
    flat = vectors.transpose(0, 1).reshape(d, -1)
    mean = flat.double().mean(1)
    centered = flat - mean.float()[:, None]
    values, basis = torch.linalg.eigh((centered @ centered.T).double() / flat.shape[1])  # ascending
    values, basis = values.flip(0)[:limit].clamp(min=0), basis.flip(1)[:, :limit].T  # [m], [m, d]
    if values[0] <= 1e-12:
        raise ValueError("linear_start requires images of more than one color; use other data, or linear_start=0")
    deviations = values.sqrt().clamp(min=SMALLEST * values[0].sqrt().item())
    return basis.float(), -(basis @ mean).float(), deviations.float()


def regression(x: Tensor, target: Tensor) -> Affine:
    """Fit the 3x3 convolution of x [N, n, H, W], padded by 1, with the least squared error to target [N, m, H, W]."""
    n, m = x.shape[1], target.shape[1]
    squares = torch.zeros(9 * n + 1, 9 * n + 1, dtype=torch.float64)
    products = torch.zeros(9 * n + 1, m, dtype=torch.float64)
    for chunk, outputs in zip(x.split(CHUNK), target.split(CHUNK), strict=True):
        patches = F.pad(
            F.unfold(chunk, 3, padding=1).transpose(1, 2).flatten(0, 1), (0, 1), value=1.0
        )  # [places, 9n+1]
        squares += patches.T @ patches
        products += patches.T @ outputs.permute(0, 2, 3, 1).reshape(-1, m)
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    solution = torch.linalg.solve(squares, products).float()  # [9n+1, m]
    return Affine(solution[:-1].T.reshape(m, n, 3, 3), solution[-1])
