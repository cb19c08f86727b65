"""Pixel space: an autoencoder that is the identity, for diffusion of pixels (Ho et al. 2020)."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from autoencoder.networks.posterior import Posterior
from stipple_core.files.json_file import write_json

NAME = "pixels"  # used instead of a path; a folder of this name is ./pixels
CLASS = "Pixels"  # _class_name in vae/config.json


class Pixels(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] are their own latents; implements `autoencoder.interface.FirstStage`."""

    downsampling, latent_channels = 1, 3
    scaling_factor, shift_factor = 1.0, 0.0  # latents are 8-bit values / 127.5 - 1, as in Ho et al. 2020
    decodes = True
    latent_rgb = None  # estimates of z_0 are their own previews
    class_name = CLASS

    def encode(self, images: Tensor) -> Posterior:
        """Return images [B, 3, H, W] in [-1, 1] of any size as a posterior that is a point."""
        return Posterior(images, torch.full_like(images, -math.inf))

    def decode(self, latents: Tensor) -> Tensor:
        """Return latents [B, 3, H, W], which are images in about [-1, 1], not clamped."""
        return latents

    def fingerprint(self) -> str:
        """A constant: all instances are equal."""
        return hashlib.sha256(CLASS.encode()).hexdigest()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write vae/config.json into a model folder. The dtype is ignored, because there are no weights."""
        target = Path(folder) / "vae"
        target.mkdir(parents=True, exist_ok=True)
        write_json({"_class_name": CLASS}, target / "config.json")
