"""Proof that images far larger than those of training are drawn in little memory and without seams.

pytest -m slow tests/tasks/test_task_large.py --basetemp=runs/large      the results are in docs/tasks/large.md

A model is trained on textures of 128 x 128 pixels, and draws 1024 x 1024. TEXTURES_MODEL=FOLDER uses a trained one.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder.networks import tiling
from ldm.pipeline import TextToImage
from stipple_core.images.images import image_to_tensor
from tests.helpers.data.textures import COLORS, SIDE, draw, make_set
from tests.helpers.training.tiny_runs import ROOT, launch

LARGE = 1024  # pixels
LIMIT = 3 * 2**20  # KiB
PROMPTS = ("blue pebbles", "green waves")
F = 8  # pixels per latent
WINDOW, OVERLAP = 32, 8  # latents
STARTS = range(0, LARGE // F - OVERLAP, WINDOW - OVERLAP)  # of windows
BORDERS = sorted({F * (start + side) for start in STARTS for side in (0, WINDOW)} - {0, LARGE})  # pixels
WAYS = {"at once": (), "in windows": ("--window", str(WINDOW), "--overlap", str(OVERLAP))}
FLAGS = ("--height", str(LARGE), "--width", str(LARGE), "--steps", "12", "--guidance-scale", "2", "--seed", "0")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Drawn:
    """An image, and the memory that it took."""

    image: Image.Image
    peak: int  # KiB, of the whole process
    seconds: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("large")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    """The folder of a model."""
    if "TEXTURES_MODEL" in os.environ:
        return Path(os.environ["TEXTURES_MODEL"])
    make_set(folder / "set", 1200, seed=0)
    data = f"data.folder={folder / 'set'}"
    stage_1 = ["--config", "configs/autoencoder/textures.yaml", data, f"run={folder / 'autoencoder'}"]
    stage_2 = ["--config", "configs/ldm/textures.yaml", data, f"autoencoder={folder / 'autoencoder' / 'model'}"]
    stage_2 += [f"cache={folder / 'cache'}", f"run={folder / 'ldm'}"]
    launch("train_autoencoder.py", *stage_1)
    launch("stipple.commands.cache", *stage_2)
    launch("train_ldm.py", *stage_2)
    return folder / "ldm" / "model"


@pytest.fixture(scope="module")
def pictures(model, folder) -> dict[str, dict[str, Drawn]]:
    """Images by prompt and way; they are saved side by side in large.png, the numbers in measured.json."""
    drawn = {p: {way: run(model, folder / f"{p} {way}", p, *flags) for way, flags in WAYS.items()} for p in PROMPTS}
    sheet = Image.new("RGB", (len(PROMPTS) * 512, len(WAYS) * 512))
    for i, by_way in enumerate(drawn.values()):
        for j, each in enumerate(by_way.values()):
            sheet.paste(each.image.resize((512, 512), Image.Resampling.LANCZOS), (i * 512, j * 512))
    sheet.save(folder / "large.png")
    measured = {
        f"{prompt}, {way}": {
            "peak_mib": each.peak / 2**10,
            "seconds": each.seconds,
            "detail": detail(each.image) / real_detail(prompt),
            "seams": seams(each.image, BORDERS),
        }
        for prompt, by_way in drawn.items()
        for way, each in by_way.items()
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))
    return drawn


def run(model: Path, outdir: Path, *arguments: str) -> Drawn:
    """Run txt2img.py as a process whose memory the kernel measures."""
    command = [sys.executable, "txt2img.py", "--checkpoint", str(model), "--outdir", str(outdir), *FLAGS, *arguments]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    (path,) = outdir.iterdir()
    return Drawn(Image.open(path).convert("RGB"), usage.ru_maxrss, time.perf_counter() - began)


def gradients(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Mean difference, in gray levels, of each row from the one above it, and of each column from its left."""
    pixels = np.asarray(image).astype(float)
    return tuple(np.abs(np.diff(pixels, axis=axis)).mean((1 - axis, 2)) for axis in (0, 1))


def seams(image: Image.Image, borders: list[int]) -> float:
    """The gradient across lines before these rows and columns, divided by that across all other borders of latents.

    Not of pixels: a small decoder of f = 8 draws every eighth line a tenth steeper, with windows or without.
    """
    ratios = []
    for gradient in gradients(image):
        lines = np.arange(1, len(gradient) + 1)
        at, latent = np.isin(lines, borders), lines % F == 0
        ratios.append(gradient[at].mean() / gradient[latent & ~at].mean())
    return float(np.mean(ratios))


def detail(image: Image.Image) -> float:
    return float(np.mean([gradient.mean() for gradient in gradients(image)]))


@cache
def real_detail(prompt: str) -> float:
    """An image of the same size, drawn as in the set."""
    return detail(draw(prompt, LARGE, np.random.default_rng(1)))


def nearest_color(image: Image.Image) -> str:
    """The color whose range is nearest to the mean of an image."""
    mean = np.asarray(image).astype(float).mean((0, 1))
    distances = {}
    for name, ends in COLORS.items():
        dark, light = (np.array(end, dtype=float) for end in ends)
        share = np.clip((mean - dark) @ (light - dark) / ((light - dark) @ (light - dark)), 0, 1)
        distances[name] = np.linalg.norm(dark + share * (light - dark) - mean)
    return min(distances, key=distances.get)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_image_of_1024_pixels_takes_less_than_3_gib(pictures, prompt, way):
    assert pictures[prompt][way].image.size == (LARGE, LARGE)
    assert pictures[prompt][way].peak < LIMIT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_part_of_it_shows_the_prompt(pictures, prompt, way):
    image = pictures[prompt][way].image
    boxes = [(x, y, x + SIDE, y + SIDE) for x in range(0, LARGE, SIDE) for y in range(0, LARGE, SIDE)]
    right = [nearest_color(image.crop(box)) == prompt.split()[0] for box in boxes]
    assert np.mean(right) >= 0.95
    assert 0.5 < detail(image) / real_detail(prompt) < 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_borders_of_windows_are_no_steeper_than_elsewhere(pictures, prompt):
    """Compared with the same lines in the image without windows, with a tolerance of 3 %."""
    ratios = {way: seams(each.image, BORDERS) for way, each in pictures[prompt].items()}
    assert ratios["in windows"] < max(1, ratios["at once"]) + 0.03


@torch.no_grad()
def test_tiled_decoding_and_encoding_are_within_a_byte_s_step_and_have_no_seams(model, pictures):
    autoencoder = TextToImage.load(model).autoencoder
    image = image_to_tensor(pictures[PROMPTS[0]]["at once"].image)[None]
    autoencoder.memory = None
    latents = autoencoder.encode(image).mode()
    whole = autoencoder.decode(latents)
    features = autoencoder.post_quant_conv(latents)
    for share in (2, 8, 32):
        autoencoder.memory = tiling.LIVE * tiling.largest(autoencoder.decoder, features) // share
        side = tiling._Tiling(autoencoder.decoder, features, autoencoder.memory).side
        borders = [start for start, _ in tiling._spans(LARGE, side)][1:]
        tiled, again = autoencoder.decode(latents), autoencoder.encode(image).mode()
        assert borders and (tiled - whole).abs().max() * 127.5 < 1 and (again - latents).abs().max() < 0.01
        ratios = [seams(Image.fromarray(pixels(x)), borders) for x in (whole, tiled)]
        print(share, side, ((tiled - whole).abs().max() * 127.5).item(), (again - latents).abs().max().item(), ratios)
        assert ratios[1] < ratios[0] + 1e-3


def pixels(images: torch.Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).add(1).mul(127.5).clamp(0, 255).round().byte().numpy()
