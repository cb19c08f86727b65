"""Proof of unCLIP (Ramesh et al. 2022) at a small scale: a prior from captions to embeddings, and a decoder of these.

EMBEDDING_RUNS=FOLDER pytest -m slow tests/tasks/test_task_prior.py; results are in docs/tasks/prior.md.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import tests.helpers.training.embedding_runs as runs
from conditioning import ConditionInputs
from ldm.pipeline import TextToImage
from ldm.sampling.prior_sampling import sample_embeddings
from stipple_core.embedders import Embedder
from stipple_core.images.images import grid, image_to_tensor, tensor_to_image
from tests.helpers.data.shapes import caption, read, same
from tests.helpers.models.small_clip import pictures

DRAWN = 8  # images of each scene, for its true embedding
SHOWN = 30  # scenes that the decoder draws
CAPTIONS = [caption(scene) for scene in runs.QUERIES]


@dataclass(frozen=True)
class Predicted:
    """Embeddings that the prior samples for unseen captions."""

    folder: Path
    embedder: Embedder
    true: Tensor  # [60, DRAWN, d], embeddings of images of each caption
    prior: Tensor  # [60, d]


@pytest.fixture(scope="module")
def predicted(tmp_path_factory) -> Predicted:
    folder = runs.data(runs.folder_of(tmp_path_factory.mktemp("prior")))
    embedder, prior = runs.clip(folder), TextToImage.load(runs.prior(folder))
    with torch.inference_mode():
        true = runs.truth(embedder, runs.QUERIES, DRAWN)
        return Predicted(folder, embedder, true, sample_embeddings(prior, prior.plan(CAPTIONS, seed=100)))


@pytest.fixture(scope="module")
def cosines(predicted) -> dict[str, float]:
    """Mean cosines to the embeddings of images of unseen captions, and how often the right caption is nearest."""
    true, embedder = predicted.true, predicted.embedder
    with torch.inference_mode():
        best = F.normalize(true, dim=-1).flatten(0, 1).mean(0).expand(len(true), -1)  # the best constant
        numbers = {
            "prior": cosine(predicted.prior, true),
            "text": cosine(embedder.texts(CAPTIONS), true),
            "best_constant": cosine(best, true),
            "another_picture": cosine(runs.truth(embedder, runs.QUERIES, 1, seed=8)[:, 0], true),
            "right_of_60_by_prior": matched(predicted.prior, true),
            "right_of_60_by_text": matched(embedder.texts(CAPTIONS), true),
        }
    return saved(numbers, predicted.folder / "prior.json")


@pytest.fixture(scope="module")
def drawn(predicted) -> dict[str, float]:
    """Images decoded from true embeddings and from the prior's: cosines of their embeddings, and recognized scenes."""
    model, scenes, numbers = TextToImage.load(runs.decoder(predicted.folder)), runs.QUERIES[:SHOWN], {}
    originals = pictures(scenes, random.Random(7))
    with torch.inference_mode():
        own, rows = predicted.embedder.images(originals), {"picture": [*map(tensor_to_image, originals)]}
        for name, points in (("its embedding", own), ("prior", predicted.prior[:SHOWN])):
            made = rows[name] = decoded(model, points)
            again = predicted.embedder.images(torch.stack([image_to_tensor(image) for image in made]))
            numbers[f"cosine from {name}"] = cosine(again, predicted.true[:SHOWN])
            numbers[f"scenes right from {name}"] = sum(map(same, map(read, made), scenes)) / SHOWN
            numbers[f"colors right from {name}"] = runs.colored(made, scenes)
    labels = [f"{row}: {text}" for row in rows for text in CAPTIONS[:8]]
    shown = [image.resize((96, 96)) for made in rows.values() for image in made[:8]]
    grid(shown, 8, labels).quantize(64).save(predicted.folder / "prior.png", optimize=True)
    return saved(numbers, predicted.folder / "decoder.json")


def saved(numbers: dict[str, float], path: Path) -> dict[str, float]:
    """Print the numbers, write them to a file, and return them."""
    path.write_text(json.dumps(numbers, indent=2))
    print(json.dumps(numbers, indent=2))
    return numbers


def decoded(model: TextToImage, points: Tensor) -> list[Image.Image]:
    """Draw an image of each embedding [B, d]."""
    made = []
    for place, settings in enumerate(model.plan([""] * len(points), seed=5, inputs=ConditionInputs(prompts=[""]))):
        (batch,) = model.batches([settings], 1)
        *_, last = model.sample(batch, inputs=ConditionInputs(prompts=[""], embedding=points[place : place + 1]))
        made += model.decode(last.z)
    return made


def cosine(points: Tensor, true: Tensor) -> float:
    """The mean cosine of points [N, d] to those of N scenes [N, each, d]."""
    return (F.normalize(points, dim=-1)[:, None] * F.normalize(true, dim=-1)).sum(-1).mean().item()


def matched(points: Tensor, true: Tensor) -> float:
    """How often the scene whose mean embedding is nearest is the right one."""
    centers = F.normalize(true.mean(1), dim=-1)
    return ((points @ centers.T).argmax(1) == torch.arange(len(points))).float().mean().item()


@pytest.mark.slow
def test_the_prior_is_nearer_to_images_of_unseen_captions_than_the_best_constant(cosines):
    assert cosines["prior"] > cosines["best_constant"] + 0.5


@pytest.mark.slow
def test_the_prior_is_nearer_to_them_than_the_captions_own_embedding(cosines):
    """The small CLIP has almost no gap between its modalities, so distances from 1 are compared."""
    assert 1 - cosines["prior"] < 0.75 * (1 - cosines["text"])


@pytest.mark.slow
def test_the_decoder_draws_the_scene_of_an_embedding(drawn, cosines):
    assert drawn["cosine from its embedding"] > cosines["best_constant"] + 0.1


@pytest.mark.slow
def test_the_decoder_draws_unseen_captions_through_the_prior(drawn, cosines):
    assert drawn["cosine from prior"] > cosines["best_constant"] + 0.1
