"""The proof that text conditioning and guidance work: a model trained from scratch on colored shapes, in minutes.

pytest -m slow tests/data/test_shapes.py --basetemp=runs/shapes      the results are in docs/shapes.md
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from autoencoder import Autoencoder
from ldm.pipeline import TextToImage
from stipple_core.images.images import grid, image_to_tensor, tensor_to_image
from tests.helpers.shapes import PAIRS, SIDE, SINGLES, Scene, caption, draw, make_set, read, same

ROOT = Path(__file__).parents[2]
COUNT = 4000  # pictures in the set
UNSEEN = random.Random(1).sample(PAIRS, 48)  # captions that are not in the set, though each of their words is
TOLD: list[Scene] = [*random.Random(2).sample(SINGLES, 16), *UNSEEN]
OTHERS = TOLD[1:] + TOLD[:1]  # the same captions, each at another one's place


def scenes(count: int, seed: int) -> list[tuple[Scene, Image.Image]]:
    draws = random.Random(seed)
    chosen = [draws.choice(draws.choice((SINGLES, PAIRS))) for _ in range(count)]
    return [(scene, draw(scene, draws)) for scene in chosen]


def right(pictures: list[Image.Image], told: list[Scene]) -> float:
    """The share of pictures that show what they were told to, and nothing else."""
    return sum(same(read(image), scene) for image, scene in zip(pictures, told, strict=True)) / len(told)


def test_the_analysis_reads_known_scenes_right():
    known = scenes(1000, seed=3)
    assert right([image for _, image in known], [scene for scene, _ in known]) >= 0.99
    sizes = [[each.size for each in read(image)] == [each.size for each in scene] for scene, image in known]
    assert sum(sizes) / len(known) >= 0.99


def test_the_analysis_accepts_no_other_scene():
    for scene, image in scenes(100, seed=4):
        seen = read(image)
        assert not any(same(seen, other) for other in [(), *TOLD] if not same(scene, other))
    assert read(Image.new("RGB", (SIDE, SIDE), "white")) == ()


@dataclass(frozen=True)
class Trained:
    """The finished model, and 64 pictures by it for each guidance scale."""

    autoencoder: Autoencoder
    pictures: dict[float, list[Image.Image]]


def run(script: str, *arguments: str) -> None:
    """A script of the project, in a process of its own; one thread, as more are slower at this size."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, script, *arguments], cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("shapes")
    make_set(folder / "set", COUNT, set(UNSEEN), seed=0)
    data = f"data.folder={folder / 'set'}"
    run("train_autoencoder.py", "--config", "configs/autoencoder/shapes.yaml", data, f"run={folder / 'autoencoder'}")
    stage_2 = ["--config", "configs/ldm/shapes.yaml", data, f"autoencoder={folder / 'autoencoder' / 'model'}"]
    stage_2 += [f"cache={folder / 'cache'}", f"run={folder / 'ldm'}"]
    run("stipple.commands.cache", *stage_2)
    run("train_ldm.py", *stage_2)
    model, prompts = TextToImage.load(folder / "ldm" / "model"), [caption(scene) for scene in TOLD]
    pictures = {s: model(prompts, guidance_scale=s, batch_size=32, seed=0) for s in (0.0, 1.0, 3.0, 7.0)}
    report(folder, pictures)
    return Trained(model.autoencoder, pictures)


def report(folder: Path, pictures: dict[float, list[Image.Image]]) -> None:
    """The measured shares, and the pictures at guidance scale 3, for docs/shapes.md."""
    shares = {scale: right(images, TOLD) for scale, images in pictures.items()}
    measured = {
        "right_by_guidance_scale": shares,
        "right_with_size_at_3": sum(read(i) == s for i, s in zip(pictures[3.0], TOLD, strict=True)) / len(TOLD),
        "right_single_objects_at_3": right(pictures[3.0][:16], TOLD[:16]),
        "right_unseen_pairs_at_3": right(pictures[3.0][16:], UNSEEN),
        "right_with_shuffled_captions_at_3": right(pictures[3.0], OTHERS),
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))
    enlarged = [image.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST) for image in pictures[3.0]]
    grid(enlarged, 8, [caption(scene) for scene in TOLD]).quantize(64).save(folder / "samples.png", optimize=True)


@pytest.mark.slow
def test_the_autoencoder_keeps_colors_and_shapes(trained):
    known = scenes(200, seed=5)
    posteriors = [trained.autoencoder.encode(image_to_tensor(image)[None]) for _, image in known]
    again = [tensor_to_image(trained.autoencoder.decode(posterior.mode())[0]) for posterior in posteriors]
    assert right(again, [scene for scene, _ in known]) >= 0.97


@pytest.mark.slow
def test_pictures_show_what_the_caption_says_at_guidance_scale_3(trained):
    assert right(trained.pictures[3.0], TOLD) >= 0.9


@pytest.mark.slow
def test_pairs_that_no_training_caption_named_are_drawn_too(trained):
    assert right(trained.pictures[3.0][16:], UNSEEN) >= 0.85


@pytest.mark.slow
def test_without_captions_the_pictures_are_others(trained):
    """At guidance scale 0 the model is told nothing."""
    assert right(trained.pictures[0.0], TOLD) <= 0.1


@pytest.mark.slow
def test_the_pictures_do_not_show_what_other_captions_say(trained):
    assert right(trained.pictures[3.0], OTHERS) <= 0.1
