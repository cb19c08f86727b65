"""Opening any autoencoder: KL or VQ, pixel space, or image embeddings."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from autoencoder import image_embeddings, pixels
from autoencoder.autoencoder import Autoencoder
from autoencoder.formats.autoencoder_folder import FOLDERS
from autoencoder.image_embeddings import ImageEmbeddings
from autoencoder.interface import FirstStage
from autoencoder.pixels import Pixels
from stipple_core.files.json_file import read_json


def open_autoencoder(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> FirstStage:
    """Open an autoencoder of any kind.

    Args:
        path: "pixels", a model folder, or anything that `Autoencoder.load` reads.
        device, dtype, variant: as of `Autoencoder.load`.

    Raises:
        FileNotFoundError, ValueError: as `Autoencoder.load`.
    """
    if str(path) == pixels.NAME:
        return Pixels()
    for folder in (Path(path), *(Path(path) / name for name in FOLDERS)):
        config = folder / "config.json"
        kind = read_json(config).get("_class_name") if config.is_file() else None
        if kind == pixels.CLASS:
            return Pixels()
        if kind == image_embeddings.CLASS:
            return ImageEmbeddings.load(folder, dtype).to(device)
    return Autoencoder.load(path, device, dtype, variant)
