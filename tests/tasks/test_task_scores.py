"""Proof of the likelihood of score SDEs: the ODE's bits of held-out images are below those of the bound.

STIPPLE_PHOTOS=FOLDER pytest -m slow -n 0 tests/tasks/test_task_scores.py --basetemp=runs/scores

The results are in docs/tasks/scores.md.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor

from benchmarks.quality.bits import held_out
from ldm import TextToImage
from stipple_core.images.images import grid, image_to_tensor
from tests.helpers.training.pixel_runs import measured, photos
from tests.helpers.training.tiny_runs import run_here

STEPS = [150, 600, 1200]
EARLY, LATE = 30, 700  # steps of the models whose images are compared
DRAWN = 64  # images of each


@pytest.fixture(scope="module")
def results(tmp_path_factory, settings_of_runs) -> list[dict]:
    found = measured("vpsde-small", tmp_path_factory.mktemp("scores"), STEPS, images=16, levels=500)
    return [found[f"{steps} steps"] for steps in STEPS]


@pytest.mark.slow
def test_the_odes_bits_are_below_the_bound_of_the_same_model_on_the_same_images(results):
    for result in results[1:]:
        assert result["ode"] < result["bound"]
        assert result["above_ode"] > 0.9  # for nearly every image, not only on average


@pytest.mark.slow
def test_both_fall_with_training(results):
    for name in ("bound", "ode"):
        bits = [result[name] for result in results]
        assert bits == sorted(bits, reverse=True)


@pytest.fixture(scope="module", params=["ncsn", "vesde", "subvpsde"])
def distances(request, tmp_path_factory, settings_of_runs) -> dict[str, float]:
    """Distances from photographs to images of a model after a few steps, and after 700.

    SCORE_RUNS names a folder to keep the runs in, where what is there is not trained again.
    """
    folder = Path(os.environ.get("SCORE_RUNS") or tmp_path_factory.mktemp("pictures"))
    run, true = folder / request.param, held_out(photos(), 16, 0.02, 148)
    found, shown = {}, []
    for count in (EARLY, LATE):
        overrides = [f"data.folder={photos()}", f"run={run}", f"trainer.steps={count}"]
        if not (folder / f"{request.param}-{count}").exists():
            run_here("train_ldm.py", "--config", f"configs/ldm/{request.param}-small.yaml", *overrides)
            shutil.copytree(run / "model", folder / f"{request.param}-{count}")
        model = TextToImage.load(folder / f"{request.param}-{count}")
        made = model("", num_images=DRAWN, batch_size=DRAWN, seed=0, guidance_bound=1.0)
        found[f"{count} steps"] = frechet(true, torch.stack([image_to_tensor(image) for image in made]))
        shown += [image.resize((48, 48)) for image in made[:12]]
    found["other photographs"] = frechet(true[::2], true[1::2])
    grid(shown, 12).save(folder / f"{request.param}.png", optimize=True)
    (folder / f"{request.param}.json").write_text(json.dumps(found))
    print(request.param, found)
    return found


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of images [N, 3, 16, 16], each as means over 2 x 2 pixels.

    Means over more pixels don't tell noise from plain gray.
    """
    means, spreads = [], []
    for images in (a, b):
        seen = F.avg_pool2d(images, 2).flatten(1).double().numpy()  # [N, 192]
        means.append(seen.mean(0))
        spreads.append(np.cov(seen.T))
    root = sqrtm(spreads[0] @ spreads[1]).real
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0] + spreads[1] - 2 * root))


@pytest.mark.slow
def test_images_become_nearer_to_photographs_with_training(distances):
    assert distances[f"{LATE} steps"] < 0.5 * distances[f"{EARLY} steps"]
