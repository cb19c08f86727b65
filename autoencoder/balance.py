"""Balanced latents: an error in any latent has the same effect on the image.

Training an autoencoder does not determine the scale of its latents, nor how they are mixed: the 1x1 convolutions around
the latents can apply any linear map and its inverse without a change of the reconstructions. It matters to a diffusion
model, whose loss and noise treat all latents alike. `balance` chooses the linear map by the effect of each latent on
the decoded image. Coarse structure and color then have large variances and fine detail has small ones, as in images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoencoder.autoencoder import Autoencoder

STEP = 0.5  # of the finite differences, in standard deviations of a latent


@torch.no_grad()
def sensitivity(autoencoder: Autoencoder, images: Tensor, generator: torch.Generator) -> Tensor:
    """Measure how images change with latents: [c, c], the mean of J^T J, with J the decoder's Jacobian at one place.

    J is measured by finite differences for each channel, at all places at once with a random sign each, so that
    products of two places average out. The latents are those of the networks, which are not unit-scale.

    Args:
        autoencoder: with a Gaussian posterior.
        images: [B, 3, H, W] in [-1, 1]; a few dozen are enough.
        generator: of the signs, on the CPU.
    """
    latents = autoencoder.posterior(images).mode()
    b, c, h, w = latents.shape
    steps = STEP * latents.transpose(0, 1).flatten(1).std(dim=1)  # [c]
    total = torch.zeros(c, c, dtype=torch.float64)
    for sample in latents.split(1):  # [1, c, h, w]
        directions = torch.randint(0, 2, (1, 1, h, w), generator=generator).to(sample) * 2 - 1
        changed = sample + torch.diag(steps)[:, :, None, None] * directions  # [c, c, h, w]: one channel each
        slopes = (autoencoder._decode(changed) - autoencoder._decode(sample)).flatten(1) / steps[:, None]  # [c, pixels]
        total += (slopes @ slopes.T).double().cpu()
    return total / (b * h * w)


@torch.no_grad()
def balance(autoencoder: Autoencoder, images: Tensor, generator: torch.Generator, degree: float = 1.0) -> Tensor:
    """Multiply the latents of an autoencoder by M^(degree / 2), where M is its `sensitivity`, and return that matrix.

    Reconstructions from the posterior's mode do not change. The posterior's variances become constants, the mean over
    these images, because the log-variances of a mixture are not an affine function of those of its parts.

    Args:
        autoencoder: with a Gaussian posterior; its latent scale has to be measured afterwards.
        images, generator: as of `sensitivity`.
        degree: 1 gives all latents the same effect on the image; 0 does not change them.

    Raises:
        ValueError: the autoencoder has a codebook, whose nearest codes would change.
    """
    if autoencoder.config.regularizer != "kl":
        raise ValueError("latents of a codebook can't be balanced, because the nearest codes would change; use kl")
    values, vectors = torch.linalg.eigh(sensitivity(autoencoder, images, generator))
    values = values.clamp(min=1e-6 * values.max().item())
    matrix, inverse = (vectors @ torch.diag(values ** (direction * degree / 2)) @ vectors.T for direction in (1, -1))
    variances = autoencoder.posterior(images).variance.mean(dim=(0, 2, 3)).double().cpu()
    c, before, after = autoencoder.latent_channels, autoencoder.quant_conv, autoencoder.post_quant_conv
    for part in (before.weight, before.bias):
        part[:c] = (matrix @ part[:c].double().cpu().reshape(c, -1)).view_as(part[:c]).to(part)
        part[c:] = 0
    before.bias[c:] = (matrix.square() @ variances).clamp(min=math.exp(-30)).log().to(before.bias)
    after.weight[:] = (after.weight[:, :, 0, 0].double().cpu() @ inverse)[:, :, None, None].to(after.weight)
    return matrix
