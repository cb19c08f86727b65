"""Proof of super-resolution, alone and at the end of a cascade: trained on crops of photographs, in minutes.

STIPPLE_PHOTOS=FOLDER pytest -m slow -n 0 tests/tasks/test_task_super_resolution.py --basetemp=runs/super-resolution
The results are in docs/tasks/super-resolution.md and docs/tasks/cascade.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.losses.similarity import psnr, ssim
from autoencoder.losses.trained_features import FeatureDistance
from conditioning.hints.degradation import resized
from ldm.pipeline import TextToImage
from stipple_core.images.images import grid, image_to_tensor, tensor_to_image
from tests.helpers.data.photo_crops import CROP, SIDE, make_crops, make_small, photo_files, whole
from tests.helpers.proofs.photo_classes import photos
from tests.helpers.proofs.photo_distances import frechet, train_distance
from tests.helpers.training.tiny_runs import run_here

MEAN = {"sampler": "ddim", "steps": 1, "guidance_scale": 1.0}  # the mean of possible images
DRAWN = {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0}  # nearer to one possible image
FIRST = {"sampler": "ddim", "steps": 50, "guidance_scale": 1.0, "guidance_bound": 1.0}
NOISE = 0.1  # on images of the first stage
MADE = 32  # images of the cascade


@dataclass(frozen=True)
class Measured:
    """Photographs at 128 x 128, their enlargements from a sixteenth of the pixels, and images of a cascade."""

    truth: Tensor  # [B, 3, 128, 128] held-out photographs
    bicubic: Tensor  # enlarged from 32 x 32
    model: Tensor
    drawn: Tensor  # by the model in a few steps
    first: Tensor  # [MADE, 3, 32, 32] by the first stage
    first_bicubic: Tensor  # [MADE, 3, 128, 128]
    cascade: Tensor
    distance: FeatureDistance


def enlarged(small: Tensor) -> Tensor:
    """Enlarge by bicubic interpolation: [B, 3, 32, 32] -> [B, 3, 128, 128]."""
    return F.interpolate(small, size=(SIDE, SIDE), mode="bicubic").clamp(-1, 1)


def by_model(model: TextToImage, small: Tensor, noise_level: float, **settings) -> Tensor:
    """Enlarge 8-bit images by a model with seeds 0, 1, 2, ..., as stipple upscale does."""
    files = [tensor_to_image(image) for image in small]
    made = [model("", image=x, noise_level=noise_level, seed=i, **settings)[0] for i, x in enumerate(files)]
    return torch.stack([image_to_tensor(image) for image in made])


def measure(second: TextToImage, first: TextToImage, truth: Tensor, crops: Path) -> Measured:
    """Draw all images, and enlarge them in both ways."""
    small = torch.stack([resized(image, (CROP, CROP), "bicubic").clamp(-1, 1) for image in truth])
    prompts = [""] * MADE
    made = []
    for batch in first.batches(first.plan(prompts, seed=0, **FIRST), 16):
        for step in first.sample(batch):
            latents = step.z
        made.append(first.autoencoder.decode(latents).clamp(-1, 1))
    made = torch.cat(made)
    return Measured(
        truth=truth,
        bicubic=enlarged(small),
        model=by_model(second, small, 0.0, **MEAN),
        drawn=by_model(second, small, 0.0, **DRAWN),
        first=made,
        first_bicubic=enlarged(made),
        cascade=by_model(second, made, NOISE, **DRAWN),
        distance=train_distance(crops),
    )


def figures(all_of_it: Measured) -> dict[str, dict[str, float]]:
    """The measured values, by name and way."""
    truth, distance = all_of_it.truth, all_of_it.distance
    ways = {"bicubic": all_of_it.bicubic, "model": all_of_it.model, "model, 4 steps": all_of_it.drawn}
    cascades = {"bicubic": all_of_it.first_bicubic, "cascade": all_of_it.cascade}
    return {
        "ssim": {name: ssim(truth, way).mean().item() for name, way in ways.items()},
        "psnr": {name: psnr(truth, way).mean().item() for name, way in ways.items()},
        "feature_distance": {name: distance(truth, way).mean().item() for name, way in ways.items()},
        "frechet": {name: frechet(distance, truth, way) for name, way in ways.items()},
        "frechet_of_cascade": {name: frechet(distance, truth, way) for name, way in cascades.items()},
    }


def report(folder: Path, all_of_it: Measured) -> None:
    """The numbers, and some images, for docs/tasks."""
    (folder / "measured.json").write_text(json.dumps(figures(all_of_it), indent=2))
    print(json.dumps(figures(all_of_it), indent=2))
    rows = (all_of_it.bicubic, all_of_it.model, all_of_it.drawn, all_of_it.truth)
    grid([tensor_to_image(x) for row in rows for x in row[:7]], 7).save(folder / "enlarged.webp", quality=85)
    rows = (all_of_it.first_bicubic, all_of_it.cascade)
    grid([tensor_to_image(x) for row in rows for x in row[:7]], 7).save(folder / "cascade.webp", quality=85)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, settings_of_runs) -> Measured:
    source = photos()
    if source is None:
        pytest.skip("no photographs: STIPPLE_PHOTOS names no folder")
    folder = tmp_path_factory.mktemp("super-resolution")
    train, held_out = photo_files(source)
    make_crops(train, folder / "crops", seed=0)
    make_small(train, folder / "small")
    second = ["--config", "configs/ldm/super-resolution-small.yaml", f"data.folder={folder / 'crops'}"]
    run_here("train_ldm.py", *second, f"run={folder / 'second'}")
    first = ["--config", "configs/ldm/ddpm-small.yaml", f"data.folder={folder / 'small'}", "data.captions=[]"]
    run_here("train_ldm.py", *first, f"run={folder / 'first'}")
    models = [TextToImage.load(folder / name / "model") for name in ("second", "first")]
    all_of_it = measure(*models, whole(held_out), folder / "crops")
    report(folder, all_of_it)
    return all_of_it


def lower(measured: Measured, name: str, way: str) -> float:
    """A distance, relative to that of bicubic interpolation."""
    return figures(measured)[name][way] / figures(measured)[name]["bicubic"]


@pytest.mark.slow
def test_the_structure_is_nearer_to_the_photograph_than_by_bicubic_interpolation(measured):
    found = figures(measured)["ssim"]
    assert found["model"] > found["bicubic"]


@pytest.mark.slow
def test_the_features_are_nearer_to_those_of_the_photograph(measured):
    assert lower(measured, "feature_distance", "model") < 0.95


@pytest.mark.slow
def test_a_cascade_is_nearer_to_photographs_than_its_first_stage_enlarged(measured):
    assert lower(measured, "frechet_of_cascade", "cascade") < 0.9
