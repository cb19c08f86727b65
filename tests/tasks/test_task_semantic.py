"""Proof of semantic synthesis: a model trained from scratch on colored regions, in minutes.

pytest -m slow -n 0 tests/tasks/test_task_semantic.py --basetemp=runs/semantic
The results are in docs/tasks/semantic.md.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conditioning.hints.hint_files import Files
from ldm.pipeline import TextToImage
from stipple_core.images.images import grid, tensor_to_image
from tests.helpers.data.regions import COLORS, SIDE, agreement, draw_map, draw_picture, make_set
from tests.helpers.models.hinted_images import draw_with_hints
from tests.helpers.training.tiny_runs import run_here

COUNT = 1500  # images in the set
ASKED = 48  # held-out maps


def held_out() -> list[np.ndarray]:
    draws = np.random.default_rng(1)
    return [draw_map(draws) for _ in range(ASKED)]


def shares(pictures: list[Image.Image], maps: list[np.ndarray]) -> list[float]:
    return [agreement(*pair) for pair in zip(pictures, maps, strict=True)]


def test_the_analysis_recognizes_the_regions_of_its_own_map_only():
    draws = np.random.default_rng(2)
    maps = [draw_map(draws) for _ in range(100)]
    pictures = [draw_picture(classes, draws) for classes in maps]
    assert np.mean(shares(pictures, maps)) > 0.98
    assert np.mean(shares(pictures[1:], maps[:-1])) < 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory, settings_of_runs) -> tuple[list[Image.Image], Path]:
    """An image for each held-out map, drawn by a model trained from scratch, and its folder."""
    folder = tmp_path_factory.mktemp("semantic")
    make_set(folder / "set", COUNT, seed=0)
    data = [f"data.folder={folder / 'set' / 'pictures'}", f"data.maps={folder / 'set' / 'maps'}"]
    run_here("train_ldm.py", "--config", "configs/ldm/semantic-small.yaml", *data, f"run={folder / 'run'}")
    model = TextToImage.load(folder / "run" / "model")
    hint = model.conditioner.readers["spatial"].hint
    files = [Files(map=torch.from_numpy(classes)[None].float()) for classes in held_out()]
    hints = torch.cat([hint.of_files(each, SIDE, SIDE, torch.Generator()) for each in files])
    pictures = [tensor_to_image(image) for image in draw_with_hints(model, hints, guidance_scale=1.0)]
    report(folder, pictures)
    return pictures, folder


def report(folder: Path, pictures: list[Image.Image]) -> None:
    """The measured shares, and some maps above their images, for docs/tasks/semantic.md."""
    maps = held_out()
    right, others = shares(pictures, maps), shares(pictures[1:] + pictures[:1], maps)
    by_class = [
        np.concatenate([(np.asarray(classes) == k)[..., None] for classes in maps]).mean() for k in range(len(COLORS))
    ]
    measured = {"mean": np.mean(right), "worst": min(right), "other_maps": np.mean(others), "share_of_class": by_class}
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))
    shown = [Image.fromarray(COLORS[classes].astype(np.uint8)) for classes in maps[:12]]
    shown = [image.resize((3 * SIDE,) * 2, Image.Resampling.NEAREST) for image in (*shown, *pictures[:12])]
    grid(shown, 12).save(folder / "samples.png", optimize=True)


@pytest.mark.slow
def test_pixels_have_the_color_of_their_region(trained):
    assert np.mean(shares(trained[0], held_out())) >= 0.85


@pytest.mark.slow
def test_images_do_not_show_the_regions_of_other_maps(trained):
    pictures, maps = trained[0], held_out()
    assert np.mean(shares(pictures[1:] + pictures[:1], maps)) <= 0.5
