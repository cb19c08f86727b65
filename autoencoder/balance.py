"""Latents in which what shows most in pictures varies most, for the diffusion model that is to learn them.

An autoencoder's training leaves it open how large each latent is, and which mixture of others it holds: the 1x1
convolutions around the latents can take them to any others and back, and no reconstruction changes. A diffusion model
is not indifferent: its loss counts all latents alike, and its noise covers all alike. `balance` chooses latents such
that an error in any of them makes the same squared error in the picture, or a part of the way there. Then coarse
structure and color have the large variances and fine detail the small ones, as in pictures themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoencoder.autoencoder import Autoencoder

STEP = 0.5  # of a latent, in its standard deviations, by which its effect is measured


@torch.no_grad()
def sensitivity(autoencoder: Autoencoder, images: Tensor, generator: torch.Generator) -> Tensor:
    """How pictures change with latents: [c, c], the mean of J^T J with J the decoder's slope at one place.

    Measured by finite differences: channel by channel, all places at once by a random sign each, so that what belongs
    to two places averages out. The latents are the networks' own.

    Args:
        autoencoder: with a Gaussian posterior.
        images: to measure on, [B, 3, H, W] in [-1, 1]; a few dozen are enough.
        generator: of the signs, on the CPU.
    """
    latents = autoencoder.posterior(images).mode()
    b, c, h, w = latents.shape
    steps = STEP * latents.transpose(0, 1).flatten(1).std(dim=1)  # [c]
    total = torch.zeros(c, c, dtype=torch.float64)
    for place in latents.split(1):  # [1, c, h, w]
        signs = torch.randint(0, 2, (1, 1, h, w), generator=generator).to(place) * 2 - 1
        moved = place + torch.diag(steps)[:, :, None, None] * signs  # [c, c, h, w]: one channel each
        slopes = (autoencoder._draw(moved) - autoencoder._draw(place)).flatten(1) / steps[:, None]  # [c, pixels]
        total += (slopes @ slopes.T).double().cpu()
    return total / (b * h * w)


@torch.no_grad()
def balance(autoencoder: Autoencoder, images: Tensor, generator: torch.Generator, degree: float = 1.0) -> Tensor:
    """Change the latents of an autoencoder to M^(degree / 2) times what they are, M its `sensitivity`; returns that.

    Reconstructions from the posterior's mode stay. Its variances become constants, those of these images on average,
    since a mixture's variances are no affine function of the parts' log-variances.

    Args:
        autoencoder: with a Gaussian posterior; before its scale is measured.
        images, generator: as of `sensitivity`.
        degree: 1 makes all latents count alike in the picture; 0 leaves them as they are.

    Raises:
        ValueError: the autoencoder has a codebook, whose nearest codes would be others.
    """
    if autoencoder.config.regularizer != "kl":
        raise ValueError("latents of a codebook can't be balanced: the nearest codes would be others; use kl")
    values, vectors = torch.linalg.eigh(sensitivity(autoencoder, images, generator))
    values = values.clamp(min=1e-6 * values.max().item())
    turn, back = (vectors @ torch.diag(values ** (sign * degree / 2)) @ vectors.T for sign in (1, -1))
    variances = autoencoder.posterior(images).variance.mean(dim=(0, 2, 3)).double().cpu()
    c, before, after = autoencoder.latent_channels, autoencoder.quant_conv, autoencoder.post_quant_conv
    for part in (before.weight, before.bias):
        part[:c] = (turn @ part[:c].double().cpu().reshape(c, -1)).view_as(part[:c]).to(part)
        part[c:] = 0
    before.bias[c:] = (turn.square() @ variances).clamp(min=math.exp(-30)).log().to(before.bias)
    after.weight[:] = (after.weight[:, :, 0, 0].double().cpu() @ back)[:, :, None, None].to(after.weight)
    return turn
