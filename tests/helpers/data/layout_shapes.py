"""Colored shapes in boxes: a generator of images with layouts, and an analysis that finds the boxes in pixels."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.helpers.data.shapes import COLORS, DARKEST, FINE, FORMS, SIDE, regions

CELL = 2  # pixels, the grid of corners
SIDES = range(8, 17, CELL)  # widths and heights of boxes, in pixels
GAP = 2  # smallest distance of two boxes in pixels
COVERED = 0.2  # smallest covered fraction of a pixel that belongs to an object
LEAST_AREA = 8  # pixels; smaller regions are ignored
NAMES = [f"{color} {form}" for color in COLORS for form in FORMS]

Box = tuple[float, float, float, float]  # left, top, right, bottom, from 0 to 1


@dataclass(frozen=True)
class Placed:
    """One of the 12 classes in a box."""

    name: str
    box: Box

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{edge:g}" for edge in self.box)])


Layout = tuple[Placed, ...]


def draw_layout(draws: random.Random) -> Layout:
    """Draw a layout of two or three objects of different colors in disjoint boxes."""
    colors = draws.sample(list(COLORS), draws.choice((2, 3)))
    while True:
        boxes = [_draw_box(draws) for _ in colors]
        if all(_apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i]):
            break
    names = [f"{color} {draws.choice(list(FORMS))}" for color in colors]
    return tuple(Placed(name, tuple(x / SIDE for x in box)) for name, box in zip(names, boxes, strict=True))


def draw(layout: Layout) -> Image.Image:
    """Draw the image [32, 32] of a layout on white."""
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), "white")
    pen = ImageDraw.Draw(canvas)
    for each in layout:
        color, form = each.name.split()
        left, top, right, bottom = (edge * SIDE * FINE for edge in each.box)
        if form == "circle":
            pen.ellipse((left, top, right - 1, bottom - 1), fill=COLORS[color])
        elif form == "square":
            pen.rectangle((left, top, right - 1, bottom - 1), fill=COLORS[color])
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=COLORS[color])
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def find(image: Image.Image, color: str) -> Box | None:
    """Find the box of the largest connected region of a color; None if there is none."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    coverage = ((255 - pixels.min(axis=2)) / (255 - DARKEST)).clip(0, 1)  # [H, W]
    largest = None
    for region in regions(coverage > COVERED):
        inside = region & (coverage >= 0.9 * coverage[region].max())
        seen = min(COLORS, key=lambda name: np.abs(pixels[inside].mean(axis=0) - COLORS[name]).sum())
        if seen == color and region.sum() >= max(LEAST_AREA, 0 if largest is None else largest.sum()):
            largest = region
    if largest is None:
        return None
    rows, columns = (np.flatnonzero(largest.any(axis=axis)) for axis in (1, 0))
    return columns[0] / SIDE, rows[0] / SIDE, (columns[-1] + 1) / SIDE, (rows[-1] + 1) / SIDE


def overlap(a: Box | None, b: Box) -> float:
    """Intersection over union of two boxes; 0 for None."""
    if a is None:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (_area(a) + _area(b) - shared)


def overlaps(image: Image.Image, layout: Layout) -> list[float]:
    """For each object of a layout, the overlap of its box with the region of its color in an image."""
    return [overlap(find(image, each.name.split()[0]), each.box) for each in layout]


def write_layout(layout: Layout) -> str:
    """A layout as a prompt."""
    return "; ".join(map(str, layout))


def make_set(folder: Path, count: int, seed: int) -> None:
    """Write a folder of images with a column of objects with label and box."""
    draws = random.Random(seed)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as rows:
        for index in range(count):
            layout = draw_layout(draws)
            draw(layout).save(folder / f"{index:05d}.png")
            objects = [{"label": each.name, "box": each.box} for each in layout]
            rows.write(json.dumps({"file_name": f"{index:05d}.png", "objects": objects}) + "\n")


def _draw_box(draws: random.Random) -> tuple[int, int, int, int]:
    width, height = draws.choice(SIDES), draws.choice(SIDES)
    left, top = draws.randrange(0, SIDE - width + 1, CELL), draws.randrange(0, SIDE - height + 1, CELL)
    return left, top, left + width, top + height


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
