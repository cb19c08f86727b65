"""Textures with captions, which continue at every side, so that images of any size make sense.

A texture is pebbles, waves or clouds, in one of four colors: "blue pebbles".
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

SIDE = 128  # pixels
COLORS = {  # dark, light
    "red": ((70, 12, 20), (245, 150, 110)),
    "green": ((10, 50, 30), (175, 225, 120)),
    "blue": ((12, 25, 90), (140, 205, 250)),
    "gray": ((35, 35, 40), (235, 230, 220)),
}
PEBBLE = 26  # average distance of the centers of pebbles in pixels
WAVE = 15  # pixels from crest to crest
CLOUDS = (3.0, 7.0, 15.0)  # standard deviations of smoothing in pixels; clouds are a sum of smooth noise


def smooth(side: int, scale: float, draws: np.random.Generator) -> np.ndarray:
    """Noise [side, side] of unit variance, smooth over `scale` pixels."""
    noise = gaussian_filter(draws.standard_normal((side, side)), scale, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def pebbles(side: int, draws: np.random.Generator) -> np.ndarray:
    """Heights [side, side] in [0, 1] of round stones, from the distances to the two nearest centers."""
    places = np.mgrid[-1 : side // PEBBLE + 3, -1 : side // PEBBLE + 3].reshape(2, -1).T * PEBBLE
    middles = places + draws.uniform(-0.4, 0.4, places.shape) * PEBBLE + draws.uniform(-PEBBLE, 0, 2)
    pixels = np.mgrid[:side, :side].reshape(2, -1).T
    distances, nearest = cKDTree(middles).query(pixels, k=2)
    first, second = distances.T
    gap = np.clip((second - first) / 7, 0, 1)
    light = draws.uniform(0.55, 1.0, len(middles))[nearest[:, 0]]
    return (gap * light * (1 - 0.4 * (first / PEBBLE) ** 2)).reshape(side, side)


def waves(side: int, draws: np.random.Generator) -> np.ndarray:
    """Heights [side, side] in [0, 1] of waves with irregular horizontal crests."""
    rows = np.arange(side)[:, None]
    phase = 2 * np.pi * rows / WAVE + 1.6 * smooth(side, 14.0, draws) + draws.uniform(0, 2 * np.pi)
    return 0.5 + 0.5 * np.sin(phase)


def clouds(side: int, draws: np.random.Generator) -> np.ndarray:
    """Heights [side, side] in [0, 1] of soft patches of several sizes."""
    total = sum((i + 1) * smooth(side, scale, draws) for i, scale in enumerate(CLOUDS))
    return 1 / (1 + np.exp(-0.6 * total))


KINDS = {"pebbles": pebbles, "waves": waves, "clouds": clouds}
CAPTIONS = [f"{color} {kind}" for kind in KINDS for color in COLORS]


def draw(caption: str, side: int, draws: np.random.Generator) -> Image.Image:
    """Draw an image of side x side pixels. Raises KeyError for an unknown caption."""
    color, kind = caption.split()
    dark, light = (np.array(end, dtype=float) for end in COLORS[color])
    heights = KINDS[kind](side, draws)[..., None]
    return Image.fromarray(np.uint8(dark + (light - dark) * heights))


def make_set(folder: Path, count: int, seed: int) -> None:
    """Write `count` images and metadata.jsonl."""
    folder.mkdir(parents=True)
    draws, lines = np.random.default_rng(seed), []
    for i in range(count):
        caption, name = CAPTIONS[i % len(CAPTIONS)], f"{i:05}.png"
        draw(caption, SIDE, draws).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
