"""Crops of the photographs in STIPPLE_PHOTOS for training super-resolution, and held-out whole photographs."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stipple_core.images.images import image_to_tensor

SIDE = 128  # pixels of a photograph
CROP = 32  # pixels of a crop
TRAIN, HELD_OUT = 2000, 48  # numbers of photographs, selected by a hash of their names
PER_PHOTO = 3  # crops per photograph


def photo_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files for training, and held-out files."""
    files = [path for path in folder.rglob("*.webp")]
    files.sort(key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())
    return files[HELD_OUT : HELD_OUT + TRAIN], files[:HELD_OUT]


def make_crops(files: list[Path], folder: Path, seed: int) -> None:
    """Write random crops as PNG files to a folder."""
    draws = random.Random(seed)
    folder.mkdir(parents=True)
    for number, path in enumerate(files):
        with Image.open(path) as image:
            whole = image.convert("RGB")
        for index in range(PER_PHOTO):
            left, top = draws.randint(0, whole.width - CROP), draws.randint(0, whole.height - CROP)
            whole.crop((left, top, left + CROP, top + CROP)).save(folder / f"{number:05d}-{index}.png")


def make_small(files: list[Path], folder: Path) -> None:
    """Write whole photographs at the size of a crop, as PNG files, to a folder."""
    folder.mkdir(parents=True)
    for number, path in enumerate(files):
        with Image.open(path) as image:
            image.convert("RGB").resize((CROP, CROP), Image.Resampling.BOX).save(folder / f"{number:05d}.png")


def whole(files: list[Path]) -> Tensor:
    """Read photographs as [B, 3, 128, 128] in [-1, 1]."""
    images = []
    for path in files:
        with Image.open(path) as image:
            images.append(image_to_tensor(image.convert("RGB").resize((SIDE, SIDE))))
    return torch.stack(images)
