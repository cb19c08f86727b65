"""The discriminator's outputs for the adversarial loss of the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoencoder import PatchDiscriminator
from autoencoder.losses.adversarial_loss import Adversary
from autoencoder.losses.generator_loss import LossConfig


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block, gradients flow through the module, but not into its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def discriminate(
    discriminator: PatchDiscriminator, images: Tensor, reconstructions: Tensor, config: LossConfig
) -> Adversary:
    """Evaluate the discriminator on reconstructions, for the adversarial loss of the autoencoder."""
    with frozen(discriminator):
        logits, features = discriminator(reconstructions)
        if not config.feature_matching:
            return Adversary(logits, features)
        with torch.no_grad():
            return Adversary(logits, features, discriminator(images)[1])
