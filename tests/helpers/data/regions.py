"""Images of colored regions with semantic maps, and an analysis that reads the regions from pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32  # pixels
COLORS = np.array([(215, 40, 40), (40, 160, 50), (50, 70, 225), (240, 205, 40)])  # of classes 0 to 3
SITES = (3, 7)  # minimum and exclusive maximum number of regions
SHADE = 0.18  # largest relative change of a region's brightness
STRIPES = 12.0  # gray levels, amplitude of waves over the image
GRAIN = 6.0  # gray levels, standard deviation of noise


def draw_map(draws: np.random.Generator) -> np.ndarray:
    """Class numbers [32, 32]: each pixel has the class of the nearest of a few sites."""
    count = draws.integers(*SITES)
    sites, classes = draws.uniform(0, SIDE, (count, 2)), draws.integers(0, len(COLORS), count)
    pixels = np.stack(np.mgrid[:SIDE, :SIDE], -1)[:, :, None]  # [32, 32, 1, 2]
    return classes[np.linalg.norm(pixels - sites, axis=-1).argmin(-1)].astype(np.uint8)


def draw_picture(classes: np.ndarray, draws: np.random.Generator) -> Image.Image:
    """Draw an image of a map: each class in its color with random brightness, with stripes and noise."""
    shades = 1 + draws.uniform(-SHADE, SHADE, len(COLORS))
    angle, phase = draws.uniform(0, np.pi), draws.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIDE, :SIDE]
    stripes = STRIPES * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.9 + phase)
    pixels = (COLORS * shades[:, None])[classes] + stripes[..., None] + draws.normal(0, GRAIN, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def read_map(image: Image.Image) -> np.ndarray:
    """Read class numbers [32, 32] from an image, by the nearest color."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    return np.abs(pixels[:, :, None] - COLORS).sum(-1).argmin(-1)


def agreement(image: Image.Image, classes: np.ndarray) -> float:
    """The fraction of pixels that have the color of their class."""
    return float((read_map(image) == classes).mean())


def make_set(folder: Path, count: int, seed: int) -> None:
    """Write folder/pictures with metadata.jsonl, and folder/maps."""
    draws = np.random.default_rng(seed)
    for name in ("pictures", "maps"):
        (folder / name).mkdir(parents=True)
    with (folder / "pictures" / "metadata.jsonl").open("w") as rows:
        for index in range(count):
            classes = draw_map(draws)
            draw_picture(classes, draws).save(folder / "pictures" / f"{index:05d}.png")
            Image.fromarray(classes).save(folder / "maps" / f"{index:05d}.png")
            rows.write(json.dumps({"file_name": f"{index:05d}.png"}) + "\n")
