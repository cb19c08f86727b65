"""The interface of autoencoders: what `ldm` and `stipple` use of any of them.

`Autoencoder` (KL or VQ), `Pixels` (the identity) and `ImageEmbeddings` (no decoder) implement it. All are nn.Modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from autoencoder.networks.posterior import Posterior


@runtime_checkable
class FirstStage(Protocol):
    """Maps images [B, 3, H, W] in [-1, 1] to unit-scale latents [B, c, H/f, W/f], and back."""

    decodes: bool  # whether `decode` is implemented
    scaling_factor: float  # unit-scale latents = (latents of the networks - shift_factor) * scaling_factor
    shift_factor: float
    latent_rgb: Tensor | None  # [c + 1, 3], maps latents to colors for previews, see `preview`; None: no previews

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side. Sides of images must be divisible by it."""

    @property
    def latent_channels(self) -> int:
        """c, the number of channels of latents."""

    @property
    def class_name(self) -> str:
        """The `_class_name` in vae/config.json and model_index.json."""

    def encode(self, images: Tensor) -> Posterior:
        """Return the posterior of latents [B, c, H/f, W/f]. Raises ValueError if a side is not divisible by f."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, 3, f * h, f * w] in about [-1, 1], not clamped. Raises ValueError unless `decodes`."""

    def fingerprint(self) -> str:
        """SHA-256 of everything that latents depend on, to detect latents of another autoencoder."""

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write vae/ into a model folder. A dtype of None keeps that of the weights."""

    def to(self, *arguments: Any, **options: Any) -> Self:
        """Move to a device or dtype, as nn.Module.to."""
