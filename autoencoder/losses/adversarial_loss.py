"""Adversarial losses of the first stage: hinge loss, feature matching, adaptive weight (Esser et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Adversary:
    """Outputs of the discriminator for reconstructions, and its features of the images."""

    logits: Tensor  # [B, 1, h, w] of the reconstructions
    features: list[Tensor]  # of the reconstructions
    image_features: list[Tensor] | None = None  # of the images, for feature matching


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor, bound: float = 1e4) -> Tensor:
    """|grad nll| / (|grad adversarial| + 1e-4) at the decoder's last layer, at most `bound`, without gradients.

    Source: Esser et al. 2021, eq. 7.
    """
    (nll_gradient,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0.0, bound).detach()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss for logits of images and of reconstructions, which the caller detaches (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def feature_matching(image_features: list[Tensor], features: list[Tensor]) -> Tensor:
    """Mean absolute difference of the discriminator's features, averaged over layers (Wang et al. 2018, eq. 4).

    Gradients flow only into the features of the reconstructions.
    """
    distances = [F.l1_loss(a, b.detach()) for a, b in zip(features, image_features, strict=True)]
    return torch.stack(distances).mean()
