"""Proof of class-conditional sampling: ten classes of photographs, evaluated by a classifier of photographs.

STIPPLE_PHOTOS=FOLDER pytest -m slow tests/tasks/test_task_class.py --basetemp=runs/task-class     (docs/tasks/class.md)
"""

import json
from pathlib import Path

import pytest
import torch

from ldm.pipeline import TextToImage
from stipple_core.images.images import grid, image_to_tensor, tensor_to_image
from tests.helpers.proofs.photo_classes import (
    CLASSES,
    Classifier,
    accuracy,
    make_set,
    photos,
    read_part,
    train_classifier,
)
from tests.helpers.training.tiny_runs import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(photos() is None, reason="STIPPLE_PHOTOS names no folder of photographs"),
]
EACH = 10  # images per class
SCALES = (1.0, 2.0, 3.0, 5.0)


def run(*command: str) -> None:
    assert start(*command).wait() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The set, both stages trained on it, and the evaluation classifier."""
    folder = tmp_path_factory.mktemp("class")
    make_set(photos(), folder / "set")
    torch.set_num_threads(1)
    torch.save(train_classifier(folder / "set").state_dict(), folder / "classifier.pt")
    data = f"data.folder={folder / 'set' / 'train'}"
    stage_1 = ["--config", "configs/autoencoder/photos.yaml", data, f"run={folder / 'autoencoder'}"]
    run("train_autoencoder.py", *stage_1)
    stage_2 = ["--config", "configs/ldm/photos-class.yaml", data, f"autoencoder={folder / 'autoencoder' / 'model'}"]
    stage_2 += [f"cache={folder / 'cache'}", f"run={folder / 'ldm'}"]
    run("stipple.commands.cache", *stage_2)
    run("train_ldm.py", *stage_2)
    return folder


@pytest.fixture(scope="module")
def measured(folder) -> dict:
    return evaluate(folder)


def evaluate(folder: Path) -> dict:
    """The accuracy of the classifier on real images, on reconstructions, and on samples by guidance scale."""
    classifier = Classifier()
    classifier.load_state_dict(torch.load(folder / "classifier.pt", weights_only=True))
    classifier.eval()
    model, (images, labels) = TextToImage.load(folder / "ldm" / "model"), read_part(folder / "set" / "held_out")
    with torch.no_grad():
        again = torch.cat([model.autoencoder.decode(model.autoencoder.encode(x).mode()) for x in images.split(64)])
    measured = {"held_out": accuracy(classifier, images, labels), "reconstructed": accuracy(classifier, again, labels)}
    prompts, asked = [name for name in CLASSES for _ in range(EACH)], torch.arange(len(CLASSES)).repeat_interleave(EACH)
    made = {}
    for scale in SCALES:
        made[scale] = model(prompts, guidance_scale=scale, steps=20, batch_size=50, seed=0)
        drawn = torch.stack([image_to_tensor(image) for image in made[scale]])
        measured[f"scale {scale:g}"] = accuracy(classifier, drawn, asked)
        measured[f"scale {scale:g} by class"] = {
            name: accuracy(classifier, drawn[asked == number], asked[asked == number])
            for number, name in enumerate(CLASSES)
        }
    measured["shuffled"] = accuracy(classifier, drawn, asked.roll(EACH))
    best = max(SCALES, key=lambda scale: measured[f"scale {scale:g}"])
    measured["best scale"] = best
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))
    rows = []
    for number in range(len(CLASSES)):  # eight samples of the class, and two held-out photographs of it
        rows += made[best][number * EACH : number * EACH + 8]
        rows += [tensor_to_image(image) for image in images[labels == number][:2]]
    grid([image.resize((64, 64)) for image in rows], 10).save(folder / "samples.webp", quality=85)
    return measured


def test_the_classifier_recognizes_held_out_photographs(measured):
    assert measured["held_out"] >= 0.8


def test_the_requested_class_is_recognized_in_four_fifths_of_the_samples(measured):
    assert measured[f"scale {measured['best scale']:g}"] >= 0.8


def test_other_classes_are_not_recognized(measured):
    assert measured["shuffled"] < 0.2
