"""Generated images on disk, each made when it is first requested, and the contact sheets of them."""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from benchmarks.quality.recall_prompts import Case
from ldm import TextToImage
from stipple_core.images.drawn_pictures import encode_png, replace_file
from stipple_core.images.images import grid, load_image

CELL = 128  # pixels of a picture on a sheet, so that a caption fits under it
SHEET_BYTES = 400_000


class Gallery:
    """Images of the prompts of each case at each guidance scale. Case i has seed `seed + i` at every scale.

    Args:
        model: draws the images with its defaults, except for `steps` (None: also its default).
        cases: all cases.
        folder: stores the images, in a subfolder for this model, these settings and these prompts, so that an
            interrupted run continues.
        model_hash: identifies the model.
        batch_size: images per batch. Batches always consist of the same images.
    """

    def __init__(
        self,
        model: TextToImage,
        cases: Sequence[Case],
        folder: Path,
        model_hash: str,
        *,
        batch_size: int,
        steps: int | None,
        seed: int,
    ):
        self.model, self.cases, self.batch_size, self.steps, self.seed = model, cases, batch_size, steps, seed
        self.settings = model.plan("", guidance_scale=1, steps=steps, seed=seed)[0]
        key = [model_hash, repr(self.settings), batch_size, [case.prompts for case in cases]]
        self.folder = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]

    def make(self, kind: str, guidance_scale: float, indices: Sequence[int]) -> list[Image.Image]:
        """Return the images of the prompts of one kind of some cases."""
        folder = self.folder / f"{kind}-{guidance_scale:g}"
        paths = {i: folder / f"{i:04d}.png" for i in range(len(self.cases))}
        todo = sorted({i // self.batch_size for i in indices if not paths[i].exists()})
        folder.mkdir(parents=True, exist_ok=True)
        for batch in tqdm(todo, desc=f"{kind} at {guidance_scale:g}", unit="batch", disable=None):
            first = batch * self.batch_size
            prompts = [case.prompts[kind] for case in self.cases[first : first + self.batch_size]]
            made = self.model.generate(
                prompts,
                batch_size=self.batch_size,
                guidance_scale=guidance_scale,
                steps=self.steps,
                seed=self.seed + first,
            )
            for i, picture in enumerate(made, first):
                replace_file(encode_png(picture.image, {}), paths[i])
        return [load_image(str(paths[i])) for i in indices]


def prompts_sheet(gallery: Gallery, guidance_scale: float, count: int) -> Image.Image:
    """Draw a sheet: `count` captions of training images above, as many unseen prompts of other images below."""
    count = min(count, len(gallery.cases) // 2)
    halves = {"caption": range(count), "keywords": range(count, 2 * count)}
    images = [image for kind, half in halves.items() for image in gallery.make(kind, guidance_scale, half)]
    captions = [gallery.cases[i].prompts[kind] for kind, half in halves.items() for i in half]
    return grid([enlarge(image) for image in images], min(8, count), [plain(caption) for caption in captions])


def guidance_sheet(
    gallery: Gallery, scales: Sequence[float], references: Sequence[Image.Image], count: int
) -> Image.Image:
    """Draw a sheet with a row per prompt: images by guidance scale from left to right, then the reference."""
    images, captions = [], []
    for i in range(min(count, len(gallery.cases))):
        kind = ("caption", "keywords")[i % 2]
        images += [gallery.make(kind, scale, [i])[0] for scale in scales] + [references[i]]
        captions += [f"{scale:g}: {gallery.cases[i].prompts[kind]}" for scale in scales] + ["reference"]
    return grid([enlarge(image) for image in images], len(scales) + 1, [plain(caption) for caption in captions])


def pairs_sheet(images: Sequence[Image.Image], reconstructions: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Draw a sheet with each image above its reconstruction."""
    rows = []
    for first in range(0, len(images), columns):
        for pictures in (images, reconstructions):
            row = [enlarge(image) for image in pictures[first : first + columns]]
            rows += row + [Image.new("RGB", row[0].size, "white")] * (columns - len(row))
    return grid(rows, columns)


def enlarge(image: Image.Image) -> Image.Image:
    """Resize an image to the size of a cell."""
    return image.resize((CELL, CELL), Image.Resampling.BICUBIC)


def plain(caption: str) -> str:
    """Remove accents from a caption, for which the font of the sheet has no glyphs."""
    return "".join(c for c in unicodedata.normalize("NFKD", caption) if not unicodedata.combining(c))


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a WebP file with the best quality at which it has at most SHEET_BYTES."""
    for quality in (95, 90, 80, 65, 50):
        buffer = io.BytesIO()
        sheet.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() < SHEET_BYTES:
            break
    replace_file(buffer.getvalue(), path)
