"""Pixel space: the autoencoder that is the identity, for models of pictures themselves (Ho et al. 2020)."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from autoencoder.autoencoder import FOLDERS, Autoencoder
from autoencoder.image_embeddings import CLASS as EMBEDDINGS
from autoencoder.image_embeddings import ImageEmbeddings
from autoencoder.networks.regularizer import Posterior
from stipple_core.files.json_file import read_json, write_json

NAME = "pixels"  # instead of a path; a folder of this name is ./pixels
CLASS = "Pixels"  # _class_name in vae/config.json


class Pixels(nn.Module):
    """Images as their own latents, [B, 3, H, W] in [-1, 1]; it has the public members of `Autoencoder`, no weights."""

    downsampling, latent_channels = 1, 3
    scaling_factor, shift_factor = 1.0, 0.0  # what Ho et al. 2020 noise: values of 8 bits / 127.5 - 1
    decodes = True
    latent_rgb = None  # previews are estimates as they are
    class_name = CLASS

    def encode(self, images: Tensor) -> Posterior:
        """The images [B, 3, H, W] in [-1, 1], of any size, as a posterior that is a point."""
        return Posterior(images, torch.full_like(images, -math.inf))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 3, H, W] as they are: images, about [-1, 1] but not clamped."""
        return latents

    def fingerprint(self) -> str:
        """The same of every one."""
        return hashlib.sha256(CLASS.encode()).hexdigest()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `vae/config.json` into a model folder: it says that latents are pixels; nothing in it has a dtype."""
        target = Path(folder) / "vae"
        target.mkdir(parents=True, exist_ok=True)
        write_json({"_class_name": CLASS}, target / "config.json")


def open_autoencoder(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Autoencoder | Pixels | ImageEmbeddings:
    """The one door: "pixels", a model folder of any kind, or all that `Autoencoder.load` reads; raises as that."""
    if str(path) == NAME:
        return Pixels()
    for folder in (Path(path), *(Path(path) / name for name in FOLDERS)):
        config = folder / "config.json"
        kind = read_json(config).get("_class_name") if config.is_file() else None
        if kind == CLASS:
            return Pixels()
        if kind == EMBEDDINGS:
            return ImageEmbeddings.load(folder, dtype).to(device)
    return Autoencoder.load(path, device, dtype, variant)
