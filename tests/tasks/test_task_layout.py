"""Proof of layout-to-image: shapes lie in their boxes; a model trained from scratch on colored shapes.

pytest -m slow tests/tasks/test_task_layout.py --basetemp=runs/task-layout     (docs/tasks/layout.md)
"""

import json
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from ldm.pipeline import TextToImage
from stipple_core.images.images import grid
from tests.helpers.data.layout_shapes import draw, draw_layout, make_set, overlap, overlaps, write_layout
from tests.helpers.training.tiny_runs import start

pytestmark = pytest.mark.slow
COUNT = 6000  # images in the set
ASKED = 64  # layouts that are not in the set
SCALES = (1.0, 2.0, 3.0)
ENLARGED = 3


def run(*command: str) -> None:
    assert start(*command).wait() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The set, and both stages trained on it."""
    folder = tmp_path_factory.mktemp("layout")
    make_set(folder / "set", COUNT, seed=0)
    data = [f"data.folder={folder / 'set'}"]
    stage_1 = ["--config", "configs/autoencoder/shapes.yaml", *data, f"run={folder / 'autoencoder'}"]
    run("train_autoencoder.py", *stage_1, "data.validation=0.02")
    stage_2 = ["--config", "configs/ldm/layout-small.yaml", *data, f"autoencoder={folder / 'autoencoder' / 'model'}"]
    stage_2 += [f"cache={folder / 'cache'}", f"run={folder / 'ldm'}"]
    run("stipple.commands.cache", *stage_2)
    run("train_ldm.py", *stage_2)
    return folder


@pytest.fixture(scope="module")
def measured(folder) -> dict:
    return evaluate(folder)


def evaluate(folder: Path) -> dict:
    """Mean overlap of requested boxes with drawn ones, by guidance scale."""
    draws = random.Random(1234)
    layouts = [draw_layout(draws) for _ in range(ASKED)]
    model, measured, made = TextToImage.load(folder / "ldm" / "model"), {}, {}
    for scale in SCALES:
        made[scale] = model([write_layout(each) for each in layouts], guidance_scale=scale, steps=20, batch_size=32)
        found = [x for image, layout in zip(made[scale], layouts, strict=True) for x in overlaps(image, layout)]
        measured[f"scale {scale:g}"] = {
            "mean": sum(found) / len(found),
            "at least 0.5": sum(x >= 0.5 for x in found) / len(found),
            "absent": sum(x == 0 for x in found) / len(found),
        }
    others = layouts[1:] + layouts[:1]
    found = [x for image, layout in zip(made[SCALES[-1]], others, strict=True) for x in overlaps(image, layout)]
    measured["shuffled"] = sum(found) / len(found)
    best = max(SCALES, key=lambda scale: measured[f"scale {scale:g}"]["mean"])
    measured["best scale"] = best
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))
    grid([boxed(image, layout) for image, layout in zip(made[best][:32], layouts, strict=False)], 8).save(
        folder / "samples.png", optimize=True
    )
    return measured


def boxed(image: Image.Image, layout) -> Image.Image:
    """Enlarge an image three times, and draw the requested boxes on it."""
    large = image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for each in layout:
        left, top, right, bottom = (edge * large.width for edge in each.box)
        pen.rectangle((left, top, right - 1, bottom - 1), outline="black")
    return large


def test_the_autoencoder_keeps_the_boxes(folder):
    from stipple_core.images.images import image_to_tensor, tensor_to_image

    autoencoder, draws = TextToImage.load(folder / "ldm" / "model").autoencoder, random.Random(5)
    found = []
    for _ in range(50):
        layout = draw_layout(draws)
        again = autoencoder.decode(autoencoder.encode(image_to_tensor(draw(layout))[None]).mode())[0]
        found += overlaps(tensor_to_image(again.detach()), layout)
    assert sum(found) / len(found) >= 0.85


def test_shapes_lie_in_their_requested_boxes(measured):
    assert measured[f"scale {measured['best scale']:g}"]["mean"] >= 0.7


def test_shapes_do_not_lie_in_the_boxes_of_other_layouts(measured):
    assert measured["shuffled"] < 0.3


def test_the_overlap_of_a_box_with_itself_is_one_and_with_its_half_a_half():
    whole = (0.0, 0.0, 1.0, 0.5)
    assert overlap(whole, whole) == 1 and overlap((0.0, 0.0, 0.5, 0.5), whole) == 0.5 and overlap(None, whole) == 0
