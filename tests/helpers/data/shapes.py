"""Colored shapes with captions: a generator of images, and an analysis that reads the objects from pixels.

A scene is one object, or two, the first above the second: "a large green circle above a small red square".
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32  # pixels
FINE = 8  # drawn larger by this factor and then averaged, for antialiased edges
DARKEST = 30  # the smallest of R, G, B in every color, which shows how much of a white pixel is covered
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 30),
    "blue": (30, 60, 230),
    "yellow": (245, 210, 30),
}
FORMS = {  # by shape: covered fraction of the bounding box, and skewness of the heights of covered pixels
    "triangle": (0.58, -0.57),  # over 0.5, because partly covered pixels at the tip make the box smaller
    "circle": (np.pi / 4, 0.0),
    "square": (1.0, 0.0),
}
SIZES = {"small": (9.0, 10.0), "large": (13.0, 14.0)}  # width = height, in pixels, drawn uniformly
JITTER = 3.0  # largest offset from the center in pixels, in both directions
LEAST_AREA = 8.0  # pixels; smaller regions are ignored. The smallest object has 40


@dataclass(frozen=True)
class Object:
    """One of 24 objects."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


Scene = tuple[Object, ...]  # from top to bottom

OBJECTS = [Object(*words) for words in itertools.product(SIZES, COLORS, FORMS)]
SINGLES: list[Scene] = [(each,) for each in OBJECTS]
PAIRS: list[Scene] = list(itertools.permutations(OBJECTS, 2))


def caption(scene: Scene) -> str:
    """The caption of a scene."""
    return " above ".join(map(str, scene))


def draw(scene: Scene, draws: random.Random) -> Image.Image:
    """Draw an image [32, 32] of one or two objects, with random positions and exact sizes."""
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), "white")
    height = SIDE / len(scene)  # of the band of an object
    for row, each in enumerate(scene):
        size = draws.uniform(*SIZES[each.size])
        across, along = min(JITTER, SIDE / 2 - 1 - size / 2), min(JITTER, height / 2 - 1 - size / 2)
        left = SIDE / 2 - size / 2 + draws.uniform(-across, across)
        top = (row + 0.5) * height - size / 2 + draws.uniform(-along, along)
        _draw_object(ImageDraw.Draw(canvas), each, left * FINE, top * FINE, size * FINE)
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def _draw_object(pen: ImageDraw.ImageDraw, each: Object, left: float, top: float, size: float) -> None:
    right, bottom, color = left + size, top + size, COLORS[each.color]
    if each.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=color)
    elif each.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=color)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=color)


def read(image: Image.Image) -> Scene:
    """Read the objects of an image from top to bottom, by color and by coverage of the bounding box."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    coverage = ((255 - pixels.min(axis=2)) / (255 - DARKEST)).clip(0, 1)  # [H, W]
    objects = []
    for region in regions(coverage > 0.35):
        around = _grown(region)
        inside = np.where(around, coverage, 0.0)
        if inside.sum() >= LEAST_AREA:
            center = (np.arange(SIDE)[:, None] * inside).sum() / inside.sum()
            objects.append((center, _classify(pixels, inside)))
    return tuple(each for _, each in sorted(objects, key=lambda pair: pair[0]))


def _classify(pixels: np.ndarray, inside: np.ndarray) -> Object:
    width, height = inside.max(axis=0).sum(), inside.max(axis=1).sum()  # in fractions of pixels
    rows = inside.sum(axis=1) / inside.sum()
    from_center = np.arange(SIDE) - (np.arange(SIDE) * rows).sum()
    skewness = (from_center**3 * rows).sum() / (from_center**2 * rows).sum() ** 1.5
    form = (inside.sum() / (width * height), skewness)
    mean = pixels[inside >= 0.9 * inside.max()].mean(axis=0)
    return Object(
        size=min(SIZES, key=lambda name: abs(np.mean(SIZES[name]) - max(width, height))),
        color=min(COLORS, key=lambda name: np.abs(mean - COLORS[name]).sum()),
        shape=min(FORMS, key=lambda name: np.hypot(*np.subtract(form, FORMS[name]))),
    )


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """The connected components of a mask, with 4 neighbors."""
    remaining, regions = mask.copy(), []
    while remaining.any():
        region = np.zeros_like(mask)
        region.flat[remaining.argmax()] = True
        while (larger := _grown(region) & mask).sum() > region.sum():
            region = larger
        regions.append(region)
        remaining &= ~region
    return regions


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and its neighbors."""
    grown = np.pad(mask, 1)
    around = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
    return mask | around


def same(seen: Scene, expected: Scene) -> bool:
    """Whether two scenes have the same colors and shapes in the same order; sizes may differ."""
    return [(each.color, each.shape) for each in seen] == [(each.color, each.shape) for each in expected]


def make_set(folder: Path, count: int, unseen: set[Scene], seed: int) -> None:
    """Write a captioned image folder: a third single objects, the rest pairs, none of them in `unseen`."""
    draws = random.Random(seed)
    singles, pairs = ([scene for scene in scenes if scene not in unseen] for scenes in (SINGLES, PAIRS))
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as rows:
        for index in range(count):
            scene = draws.choice(singles if draws.random() < 1 / 3 else pairs)
            name = f"{index:05d}.png"
            draw(scene, draws).save(folder / name)
            rows.write(json.dumps({"file_name": name, "text": caption(scene)}) + "\n")
