"""Predictions a z_0 + b noise, and the formula that converts every such output to z_0.

Noise: Ho et al. 2020. Velocity: Salimans & Ho 2022. Flow: Liu et al. 2022. Score, the gradient of the log density of
z_t: Song et al. 2021. EDM, the F of Karras et al. 2022, table 1 with sigma_data 1: the normalized difference of
z_0 from its linear estimate, which is the negative velocity if alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]] = {
    "noise": lambda alpha, sigma: (0.0, 1.0),
    "clean": lambda alpha, sigma: (1.0, 0.0),
    "velocity": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
    "score": lambda alpha, sigma: (0.0, -1 / sigma),
    "edm": lambda alpha, sigma: (sigma / torch.hypot(alpha, sigma), -alpha / torch.hypot(alpha, sigma)),
}
NOISE_ALONE = ("noise", "score")  # a = 0: without signal they equal z_t and do not determine z_0


def check_prediction(prediction: str) -> None:
    """Raise ValueError for an unknown prediction."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; use one of {', '.join(PREDICTIONS)}")


def mix(z_0: Tensor, noise: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """a z_0 + b noise for images [B, ...] and numbers a and b, for all or per image [B]."""
    return per_image(a, z_0) * z_0 + per_image(b, z_0) * noise


def target(z_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The target of the network, [B, ...] like z_0 and noise; alpha and sigma are [B] or single."""
    check_prediction(prediction)
    return mix(z_0, noise, *PREDICTIONS[prediction](alpha, sigma))


def to_clean(output: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """Convert a network's output to z_0 [B, ...] at z_t = alpha z_0 + sigma noise, in the dtype of z_t.

    z_0 = (b z_t - sigma output) / (b alpha - a sigma); without noise z_0 = z_t / alpha, whatever the output.

    Args:
        output: the network's output [B, ...].
        z_t: noisy latents [B, ...].
        alpha, sigma: [B] or single, best in float64.
        prediction: a key of PREDICTIONS.

    Raises:
        ValueError: unknown prediction, or the output does not determine z_0 (noise or score, where no signal is left).
    """
    from_z_t, from_output = clean_coefficients(alpha, sigma, prediction)
    return mix(z_t, output.to(z_t.dtype), from_z_t, from_output)


def clean_coefficients(alpha: Tensor, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """The numbers (first, second) with z_0 = first * z_t + second * output; raises as `to_clean`."""
    check_prediction(prediction)
    alpha, sigma = torch.as_tensor(alpha), torch.as_tensor(sigma)
    a, b = PREDICTIONS[prediction](alpha, sigma)
    determinant = b * alpha - a * sigma
    clean = sigma == 0
    if ((determinant == 0) & ~clean).any():
        raise ValueError(
            f"{prediction} prediction does not determine z_0 where alpha is 0 (zero signal-to-noise ratio); "
            "train with velocity, flow, clean or edm prediction"
        )
    determinant = torch.where(clean, 1.0, determinant)
    return torch.where(clean, 1 / alpha, b / determinant), torch.where(clean, 0.0, -sigma / determinant)


def per_image(value: Tensor | float, images: Tensor) -> Tensor | float:
    """Numbers [B] -> [B, 1, 1, ...] in the dtype and on the device of images [B, ...]; a single number stays one."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0 and value.is_cpu:
        return value.item()  # a number needs no copy to a device, which would wait for it
    return value.to(images.device, images.dtype).view(-1, *[1] * (images.dim() - 1))
