"""Proof of inpainting: a model trained from scratch on colored shapes with random masks, in minutes.

pytest -m slow -n 0 tests/tasks/test_task_inpainting.py --basetemp=runs/inpainting   results: docs/tasks/inpainting.md
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from conditioning.hints.hint_files import Files
from conditioning.hints.masks import MaskConfig, draw_mask
from ldm.pipeline import TextToImage
from stipple_core.images.images import grid, image_to_tensor, tensor_to_image
from stipple_core.randomness import generator
from tests.helpers.data.shapes import PAIRS, SIDE, SINGLES, draw, make_set
from tests.helpers.models.hinted_images import draw_with_hints
from tests.helpers.training.tiny_runs import run_here

COUNT = 3000  # images in the set
DRAWN = 8  # completions of each hole, whose mean is evaluated
ASKED = 64  # held-out images of new scenes
MASKS = MaskConfig(boxes=0.5, strokes=0.5, whole=0.0)


def held_out() -> tuple[Tensor, Tensor]:
    """Images [B, 3, 32, 32], and masks [B, 1, 32, 32] that hide a part of their shapes."""
    draws, images, masks = random.Random(20261122), [], []
    while len(images) < ASKED:
        image = image_to_tensor(draw(draws.choice(draws.choice((SINGLES, PAIRS))), draws))
        mask = draw_mask(SIDE, SIDE, MASKS, generator(0, "held-out mask", draws.randrange(2**32)))
        shown = image.amin(0) < 0  # colored, not the white background
        hidden = (shown & (mask[0] > 0)).sum() / shown.sum()
        if 0.15 < hidden < 0.85:  # otherwise nothing or everything would be hidden
            images.append(image)
            masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def of_the_mean(images: Tensor, masks: Tensor) -> Tensor:
    """Fill the hole with the mean color of the visible pixels."""
    seen = 1 - masks
    mean = (images * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)
    return torch.where(masks > 0, mean, images)


def of_the_nearest(images: Tensor, masks: Tensor) -> Tensor:
    """Fill each pixel of the hole with the nearest visible one."""
    filled = []
    for image, mask in zip(images, masks, strict=True):
        rows, columns = distance_transform_edt(mask[0].numpy(), return_distances=False, return_indices=True)
        filled.append(image[:, rows, columns])
    return torch.stack(filled)


def error_inside(images: Tensor, filled: Tensor, masks: Tensor) -> Tensor:
    """Root mean squared error in the hole, in gray levels: [B]."""
    squares = (127.5 * (images - filled)).square().mean(1, keepdim=True) * masks
    return (squares.sum((1, 2, 3)) / masks.sum((1, 2, 3))).sqrt()


def test_fills_change_nothing_outside_the_hole_and_are_right_for_a_plain_image():
    images, masks = held_out()
    plain = images.new_tensor([0.5, -0.5, 0.0])[None, :, None, None].expand_as(images)
    for fill in (of_the_mean, of_the_nearest):
        assert torch.equal(fill(images, masks) * (1 - masks), images * (1 - masks))
        assert torch.allclose(fill(plain, masks), plain, atol=1e-6)
        assert (error_inside(images, fill(images, masks), masks) > 5).float().mean() > 0.9


@pytest.fixture(scope="module")
def filled(tmp_path_factory, settings_of_runs) -> dict[str, Tensor]:
    """Held-out images, completed in four ways: by the mean of the completions, by one of them, and by two fills."""
    folder = tmp_path_factory.mktemp("inpainting")
    make_set(folder / "set", COUNT, set(), seed=0)
    arguments = ["--config", "configs/ldm/inpaint-small.yaml", f"data.folder={folder / 'set'}"]
    run_here("train_ldm.py", *arguments, f"run={folder / 'run'}")
    model, (images, masks) = TextToImage.load(folder / "run" / "model"), held_out()
    hint = model.conditioner.readers["spatial"].hint
    files = [Files(image=image, mask=mask) for image, mask in zip(images, masks, strict=True)]
    hints = torch.cat([hint.of_files(each, SIDE, SIDE, torch.Generator()) for each in files])
    many = draw_with_hints(model, hints.repeat(DRAWN, 1, 1, 1), steps=4, guidance_scale=1.0)  # [DRAWN B, 3, 32, 32]
    drawn, one = many.unflatten(0, (DRAWN, ASKED)).mean(0), many[:ASKED]  # the mean has the least squared error
    ways = {
        "model": torch.where(masks > 0, drawn, images),
        "one": torch.where(masks > 0, one, images),
        "mean": of_the_mean(images, masks),
        "nearest": of_the_nearest(images, masks),
    }
    report(folder, ways, hints, error_inside(images, drawn, 1 - masks))
    return ways


def report(folder: Path, ways: dict[str, Tensor], hints: Tensor, outside: Tensor) -> None:
    """The measured errors, and some images, for docs/tasks/inpainting.md."""
    images, masks = held_out()
    errors = {name: error_inside(images, way, masks) for name, way in ways.items()}
    measured = {name: error.mean().item() for name, error in errors.items()}
    measured |= {f"better_than_{name}": (errors["model"] < errors[name]).float().mean().item() for name in errors}
    measured |= {"outside": outside.mean().item(), "hidden": masks.mean().item()}
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))
    gray = torch.where(masks > 0, 0.0, hints[:, :3])
    rows = [tensor_to_image(image) for row in (gray, *ways.values(), images) for image in row[:14]]
    shown = [image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST) for image in rows]
    grid(shown, 14).quantize(128).save(folder / "samples.png", optimize=True)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["mean", "nearest"])
@pytest.mark.parametrize("way", ["one", "model"])
def test_completions_are_nearer_to_the_truth_than_a_simple_fill(way, other, filled):
    images, masks = held_out()
    ours, theirs = (error_inside(images, filled[name], masks) for name in (way, other))
    assert ours.mean() < theirs.mean()
    assert np.mean((ours < theirs).tolist()) > 0.5
