"""Proof of retrieval (Blattmann et al. 2022) at a small scale: images resemble the neighbors of their queries.

EMBEDDING_RUNS=FOLDER pytest -m slow tests/tasks/test_task_retrieval.py; results are in docs/tasks/retrieval.md.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.helpers.training.embedding_runs as runs
from conditioning.readers.retrieval import nearest
from ldm.pipeline import TextToImage
from stipple_core.images.images import grid, image_to_tensor, tensor_to_image
from tests.helpers.data.shapes import OBJECTS, caption
from tests.helpers.models.small_clip import pictures

SCENES = [*runs.QUERIES[:20], *((each,) for each in OBJECTS[::2])]  # unseen pairs, and 12 single objects


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """All numbers, measured once."""
    folder = runs.data(runs.folder_of(tmp_path_factory.mktemp("retrieval")))
    with torch.inference_mode():
        numbers, sheet = measure(folder)
    (folder / "retrieval.json").write_text(json.dumps(numbers, indent=2))
    sheet.quantize(64).save(folder / "retrieval.png", optimize=True)
    print(json.dumps(numbers, indent=2))
    return numbers


def measure(folder) -> tuple[dict, object]:
    """The similarity of images drawn from prompts, and from images, to their queries and neighbors."""
    model, embedder, numbers = TextToImage.load(runs.augmented(folder)), runs.clip(folder), {}
    reader, captions = model.conditioner.readers["retrieval"], [caption(scene) for scene in SCENES]
    originals = pictures(SCENES, random.Random(9))
    asked = {"prompt": embedder.texts(captions), "picture": embedder.images(originals)}
    by_prompt = model(captions, seed=0)
    by_picture = [model("", seed=0, image=tensor_to_image(image), strength=1.0)[0] for image in originals]
    for name, made in (("prompt", by_prompt), ("picture", by_picture)):
        again = embedder.images(torch.stack([image_to_tensor(image) for image in made]))
        found = reader.database[nearest(asked[name], reader.database, reader.config.neighbors)].mean(1)  # [Q, d]
        scores = F.normalize(again, dim=-1) @ F.normalize(found, dim=-1).T  # [Q, Q]
        numbers |= {f"{key}_by_{name}": value for key, value in compared(scores).items()}
        numbers[f"colors_right_by_{name}"] = runs.colored(made, SCENES)
    shown = [*map(tensor_to_image, originals[::4]), *by_prompt[::4], *by_picture[::4]]
    rows = ("true picture", "by its caption", "by the picture")
    labels = [f"{row}: {text}" for row in rows for text in captions[::4]]
    return numbers, grid([image.resize((96, 96)) for image in shown], 8, labels)


def compared(scores: Tensor) -> dict[str, float]:
    """Summarize cosines [Q, Q] of images to neighbors of queries: to their own, to others, and how often own win."""
    own, places = scores.diag(), torch.arange(len(scores))
    others = (scores.sum() - own.sum()) / (scores.numel() - len(scores))
    return {
        "cosine_to_own_neighbors": own.mean().item(),
        "cosine_to_others_neighbors": others.item(),
        "own_is_nearest": (scores.argmax(1) == places).float().mean().item(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["prompt", "picture"])
def test_images_are_nearer_to_their_own_neighbors_than_to_those_of_other_queries(measured, asked):
    assert measured[f"cosine_to_own_neighbors_by_{asked}"] > measured[f"cosine_to_others_neighbors_by_{asked}"] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["prompt", "picture"])
def test_the_query_of_an_image_is_the_nearest_of_all(measured, asked):
    """One in 32 would be by chance."""
    assert measured[f"own_is_nearest_by_{asked}"] > 0.5
