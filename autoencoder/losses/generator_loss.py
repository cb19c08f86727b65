"""The loss of the autoencoder (Rombach et al. 2022, eq. 25).

LDM sums the reconstruction error over the pixels of a sample. Here it is the mean, and the KL term is divided by the
number of pixel values. This has the same optimum and balance of terms, but does not depend on the image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from autoencoder.losses.adversarial_loss import Adversary, adaptive_weight, feature_matching
from autoencoder.losses.color_axes import NAMES, along_axes
from autoencoder.networks.posterior import Reconstruction

Perceptual = Callable[[Tensor, Tensor], Tensor]  # (images, reconstructions) -> [B]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of `generator_loss`."""

    pixel: float = 1.0  # of the mean of |images - reconstructions|
    # weights of brightness, red-blue and green-magenta in the pixel error, such as [1, 1.5, 3]; []: RGB, unweighted
    colors: list[float] = field(default_factory=list)
    perceptual: float = 0.03  # of the perceptual distance: 0.03 for "features", 0.2 for "ssim", 1 for "lpips"
    kl: float = 1e-6  # of the KL divergence in nats per sample, relative to the pixel error summed over a sample
    codebook: float = 1.0  # of the codebook and commitment loss
    adversarial: float = 0.5  # of the adversarial loss, times the adaptive weight
    feature_matching: float = 0.0  # of the feature-matching loss

    def __post_init__(self):
        if self.colors and (len(self.colors) != 3 or min(self.colors) < 0):
            axes = ", ".join(NAMES)
            raise ValueError(
                f"loss.colors {self.colors} must be three weights, of {axes}, or none; use [1, 1, 1] or []"
            )


@dataclass(frozen=True)
class GeneratorLoss:
    """The total loss, with gradients, and its unweighted terms for the log, without. None: the term is not used."""

    total: Tensor
    pixel: Tensor
    perceptual: Tensor | None = None
    kl: Tensor | None = None  # nats per sample
    codebook: Tensor | None = None
    adversarial: Tensor | None = None
    adaptive_weight: Tensor | None = None
    feature_matching: Tensor | None = None

    def scalars(self) -> dict[str, Tensor]:
        """The total and the terms in use by name, without gradients."""
        return {name: value.detach() for name, value in vars(self).items() if value is not None}


def generator_loss(
    images: Tensor,
    reconstruction: Reconstruction,
    config: LossConfig,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
    last_layer: Tensor | None = None,
) -> GeneratorLoss:
    """L1 + perceptual + regularizer (+ adversarial) loss of a batch.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        reconstruction: `autoencoder(images, noise)`.
        config: weights of the terms.
        perceptual: (images, reconstructions) -> [B]. None: no perceptual loss.
        adversary: the discriminator's outputs for the reconstructions. None: no adversarial loss, as before it starts.
        last_layer: `autoencoder.last_layer`, for the adaptive weight. Required with `adversary`.
    """
    pixel = pixel_error(images, reconstruction.images, config.colors)
    nll = config.pixel * pixel
    parts: dict[str, Tensor] = {}
    if perceptual is not None:
        parts["perceptual"] = perceptual(images, reconstruction.images).mean()
        nll = nll + config.perceptual * parts["perceptual"]
    total = nll
    if reconstruction.codebook_loss is not None:
        parts["codebook"] = reconstruction.codebook_loss
        total = total + config.codebook * parts["codebook"]
    else:
        parts["kl"] = reconstruction.posterior.kl().mean()
        total = total + config.kl / images[0].numel() * parts["kl"]
    if adversary is not None:
        parts["adversarial"] = -adversary.logits.mean()
        # LDM's bound of 1e4 applies to an error summed over pixels, or with a codebook to its mean
        bound = 1e4 if reconstruction.codebook_loss is not None else 1e4 / images[0].numel()
        parts["adaptive_weight"] = adaptive_weight(nll, parts["adversarial"], last_layer, bound)
        total = total + config.adversarial * parts["adaptive_weight"] * parts["adversarial"]
        if adversary.image_features is not None:
            parts["feature_matching"] = feature_matching(adversary.image_features, adversary.features)
            total = total + config.feature_matching * parts["feature_matching"]
    return GeneratorLoss(total, pixel.detach(), **{name: value.detach() for name, value in parts.items()})


def pixel_error(images: Tensor, reconstructions: Tensor, colors: Sequence[float] = ()) -> Tensor:
    """Mean absolute error of reconstructions of images [B, 3, H, W].

    With `colors`, the error is computed along the color axes (`color_axes.along_axes`), with these weights.
    """
    if not colors:
        return (images - reconstructions).abs().mean()
    return (along_axes(images - reconstructions) * images.new_tensor(colors)[:, None, None]).abs().mean()
