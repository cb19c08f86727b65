"""Proof of classifier guidance: classes drawn by its gradient, by classifier-free guidance, and by both, in a table.

STIPPLE_CLASS_RUN=runs/class pytest -m slow -n 0 tests/tasks/test_task_classifier.py
The results are in docs/tasks/classifier.md.

The folder STIPPLE_CLASS_RUN has to contain the files of tests/tasks/test_task_class.py: set/, which
tests/helpers/proofs/photo_classes.py writes, and ldm/model, trained with configs/ldm/photos-class.yaml. An existing
classifier of its latents is not trained again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.formats.classifier_folder import load_classifier
from ldm.pipeline import TextToImage
from ldm.sampling.gradient_guides import ClassifierGuide
from stipple_core.images.images import grid, image_to_tensor
from tests.helpers.proofs.photo_classes import CLASSES, Classifier, accuracy, read_part, train_classifier
from tests.helpers.training.tiny_runs import run_here

RUN = os.environ.get("STIPPLE_CLASS_RUN")
EACH = 8  # images of each class
FREE = {f"classifier-free, w = {w:g}": {"guidance_scale": w} for w in (2.0, 3.0, 5.0)}
LED = {f"classifier, s = {s:g}": {"guidance_scale": 1.0, "classifier_scale": s} for s in (2.0, 5.0, 10.0)}
ALONE = {  # only the classifier is conditioned on the class
    f"classifier alone, s = {s:g}": {"guidance_scale": 1.0, "classifier_scale": s, "prompt": ""}
    for s in (2.0, 5.0, 10.0)
}
WAYS: dict[str, dict] = {
    "no guidance": {"guidance_scale": 1.0},
    **FREE,
    **LED,
    **ALONE,
    "both, w = 3, s = 2": {"guidance_scale": 3.0, "classifier_scale": 2.0},
}


def drawn(model: TextToImage, settings: Mapping) -> list[Image.Image]:
    """EACH images of every class, in the order of CLASSES."""
    pictures = []
    for name in CLASSES:
        settings_of_class = {"prompt": name, "steps": 20, "sampler": "dpmpp_2m", "seed": 1, **settings}
        settings_of_class |= {"classifier_class": name} if "classifier_scale" in settings else {}
        pictures += model(**settings_of_class, num_images=EACH, batch_size=EACH)
    return pictures


@torch.no_grad()
def features(classifier: Classifier, images: Tensor) -> Tensor:
    """The inputs of the last layer of the evaluation classifier, [N, 128]."""
    return torch.cat([classifier.layers(part).mean(dim=(2, 3)) for part in images.split(64)])


def distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of features [N, d] with diagonal covariances, as there are few images."""
    return ((a.mean(0) - b.mean(0)).square() + (a.std(0) - b.std(0)).square()).sum().item()


def spread(found: Tensor, labels: Tensor) -> float:
    """Mean distance of features [N, d] from the mean of their class: a measure of variety."""
    middles = torch.stack([found[labels == label].mean(0) for label in range(len(CLASSES))])
    return (found - middles[labels]).norm(dim=1).mean().item()


def compare(
    model: TextToImage, classifier: Classifier, held_out: tuple[Tensor, Tensor], pictures: dict
) -> dict[str, dict]:
    """By kind of guidance: accuracy, spread within classes, and distance from held-out photographs."""
    images, labels = held_out
    real = features(classifier, images)
    rows = {
        "real, held out": {"accuracy": accuracy(classifier, *held_out), "spread": spread(real, labels), "distance": 0.0}
    }
    asked = torch.arange(len(CLASSES)).repeat_interleave(EACH)
    for way, settings in WAYS.items():
        pictures[way] = drawn(model, settings)
        made = torch.stack([image_to_tensor(picture) for picture in pictures[way]])
        found = features(classifier, made)
        rows[way] = {
            "accuracy": accuracy(classifier, made, asked),
            "spread": spread(found, asked),
            "distance": distance(found, real),
        }
    return rows


def table(rows: dict[str, dict]) -> str:
    """Format the rows as a table in Markdown."""
    lines = ["| guidance | accuracy | spread within a class | feature distance |", "|---|---|---|---|"]
    lines += [f"| {way} | {r['accuracy']:.2f} | {r['spread']:.2f} | {r['distance']:.2f} |" for way, r in rows.items()]
    return "\n".join(lines)


def prove(run: Path, classifier: Classifier) -> dict[str, dict]:
    """Guide the model of a run in all ways, and save the table and some images in the run folder."""
    if not (run / "classifier").is_dir():
        data = [f"data.folder={run / 'set' / 'train'}", f"autoencoder={run / 'autoencoder' / 'model'}"]
        config = ["--config", "configs/classifier/photos-class.yaml"]
        run_here("stipple.commands.train_classifier", *config, *data, f"run={run / 'classifier'}")
    model, pictures = TextToImage.load(run / "ldm" / "model"), {}
    model.gradient_guides["classifier_scale"] = ClassifierGuide(load_classifier(run / "classifier" / "model"))
    rows = compare(model, classifier, read_part(run / "set" / "held_out"), pictures)
    (run / "classifier.md").write_text(table(rows) + "\n")
    shown = ["no guidance", "classifier-free, w = 3", "classifier, s = 5", "classifier alone, s = 5"]
    grid([picture for way in shown for picture in pictures[way][::EACH]], len(CLASSES)).save(run / "classifier.png")
    return rows


@pytest.fixture(scope="module")
def rows(settings_of_runs) -> dict[str, dict]:
    if RUN is None:
        pytest.skip("STIPPLE_CLASS_RUN names no run of tests/tasks/test_task_class.py")
    return prove(Path(RUN), train_classifier(Path(RUN) / "set"))


@pytest.mark.slow
def test_the_gradient_of_a_classifier_draws_the_requested_class_more_often_than_no_guidance(rows):
    assert max(rows[way]["accuracy"] for way in LED) > rows["no guidance"]["accuracy"] + 0.05


@pytest.mark.slow
def test_a_classifier_alone_chooses_the_class_of_an_unconditional_model(rows):
    assert max(rows[way]["accuracy"] for way in ALONE) > 3 / len(CLASSES)


@pytest.mark.slow
def test_guidance_of_either_kind_reduces_variety(rows):
    for ways in (FREE, LED):
        assert rows[list(ways)[-1]]["spread"] < rows["no guidance"]["spread"]
