"""Models, images and runs for tests of the drawing commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from conditioning.classes.class_conditioner import ClassConditioner, Unconditional
from conditioning.hints.degradation import DegradationConfig
from conditioning.hints.hints import SpatialConfig
from conditioning.readers.combined import CombinedConditioner
from conditioning.readers.spatial import SpatialReader
from ldm.pipeline import TextToImage
from tests.helpers.models.small_encoders import build_scratch
from tests.helpers.models.small_models import build_model_of

SPATIAL = {  # spatial conditioning, with 4 pixels per latent
    "inpainting": SpatialConfig(kind="inpainting", downsampling=4),
    "low_resolution": SpatialConfig(
        kind="low_resolution", downsampling=4, degradation=DegradationConfig(factor=4), noise=0.5
    ),
    "semantic": SpatialConfig(kind="semantic", downsampling=4, classes=3),
}


def build(kind: str) -> TextToImage:
    """A small random model of a kind: text, unconditional, class, or a key of SPATIAL."""
    torch.manual_seed(3)
    if kind == "text":
        return build_model_of(build_scratch())
    if kind == "unconditional":
        return build_model_of(Unconditional())
    if kind == "class":
        return build_model_of(ClassConditioner(torch.randn(4, 32), null_class=3, names=("dress", "boot", "bag")))
    prompts = build_scratch() if kind == "inpainting" else Unconditional()
    return build_model_of(CombinedConditioner(prompts, {"spatial": SpatialReader(SPATIAL[kind])}))


def folder_of(kind: str, folder: Path) -> Path:
    """Save a model of a kind, see `build`."""
    build(kind).save(folder)
    return folder


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of smooth colors."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int, height: int) -> Image.Image:
    """A mask that is white in the right half."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle([width // 2, 0, width, height], fill=255)
    return image


def pixels(picture: Image.Image | Path) -> np.ndarray:
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture)).astype(int)


def record(path: Path) -> dict:
    return json.loads(Image.open(path).text["stipple"])


def run(main, capsys, outdir: Path, *words) -> list[Path]:
    """Run a command; return the paths that it prints."""
    main([str(word) for word in ("--outdir", outdir, *words)])
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


def refused(main, capsys, outdir: Path, *words) -> str:
    """Run a command that fails; return its error of one line. Asserts exit code 2, and that nothing was written."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in ("--outdir", outdir, *words)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and not outdir.exists()
    return error
