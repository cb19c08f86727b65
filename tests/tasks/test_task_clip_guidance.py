"""Proof of CLIP guidance (GLIDE) at a small scale: an unconditional model draws what a CLIP guides it to.

EMBEDDING_RUNS=FOLDER pytest -m slow tests/tasks/test_task_clip_guidance.py; results are in docs/tasks/classifier.md.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import tests.helpers.training.embedding_runs as runs
from ldm.pipeline import TextToImage
from stipple.commands.drawing.open_guides import open_guides
from stipple_core.images.images import grid, image_to_tensor
from tests.helpers.data.shapes import OBJECTS, caption, read

SCALES = (0.0, 1.0, 3.0, 10.0)
SCENES = [(each,) for each in OBJECTS]  # 24 single objects


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[float, dict[str, float]]:
    """By scale: how often the guiding caption is nearest to the drawn image, and how often its color is there."""
    folder = runs.data(runs.folder_of(tmp_path_factory.mktemp("clip-guidance")))
    model, embedder = TextToImage.load(runs.unconditional(folder)), runs.clip(folder)
    open_guides(model, {"clip_guidance": f"local-dir:{folder / 'clip'}"})
    captions, found, shown = [caption(scene) for scene in SCENES], {}, []
    texts = F.normalize(embedder.texts(captions), dim=-1)
    for scale in SCALES:
        led = [{"clip_scale": scale, "clip_prompt": text} if scale else {} for text in captions]
        made = [model("", seed=seed, steps=20, **settings)[0] for seed, settings in enumerate(led)]
        with torch.inference_mode():
            drawn = F.normalize(embedder.images(torch.stack([image_to_tensor(image) for image in made])), dim=-1)
        nearest = (drawn @ texts.T).argmax(1) == torch.arange(len(captions))
        colors = [
            any(seen.color == scene.color for seen in read(image)) for image, (scene,) in zip(made, SCENES, strict=True)
        ]
        found[scale] = {"nearest caption": nearest.float().mean().item(), "color": sum(colors) / len(colors)}
        shown += [image.resize((64, 64)) for image in made[:8]]
    grid(shown, 8).save(folder / "clip_guidance.png", optimize=True)
    (folder / "clip_guidance.json").write_text(json.dumps(found))
    print(json.dumps(found, indent=2))
    return found


@pytest.mark.slow
def test_a_clip_trained_without_noise_guides_to_its_caption(measured):
    assert measured[0.0]["nearest caption"] < 0.2  # by chance 1 in 24
    assert measured[1.0]["nearest caption"] > 0.7


@pytest.mark.slow
def test_the_color_is_there_more_often_by_a_measure_without_clip(measured):
    assert measured[1.0]["color"] > measured[0.0]["color"] + 0.2
