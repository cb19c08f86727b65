"""Text conditioning and guidance work: a model of colored shapes is trained from scratch in minutes.

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
from tests.helpers.data.shapes import PAIRS, SIDE, SINGLES, Scene, caption, draw, make_set, read, same

ROOT = Path(__file__).parents[2]
COUNT = 4000  # images in the set
UNSEEN = random.Random(1).sample(PAIRS, 48)  # captions that are not in the set; each of their words is
SCENES: list[Scene] = [*random.Random(2).sample(SINGLES, 16), *UNSEEN]
SHUFFLED = SCENES[1:] + SCENES[:1]  # the scenes of other captions


def scenes(count: int, seed: int) -> list[tuple[Scene, Image.Image]]:
    draws = random.Random(seed)
    chosen = [draws.choice(draws.choice((SINGLES, PAIRS))) for _ in range(count)]
    return [(scene, draw(scene, draws)) for scene in chosen]


def correct(images: list[Image.Image], expected: list[Scene]) -> float:
    """The fraction of images that show exactly their scene."""
    return sum(same(read(image), scene) for image, scene in zip(images, expected, strict=True)) / len(expected)


def test_the_analysis_reads_known_scenes_correct():
    drawn = scenes(1000, seed=3)
    assert correct([image for _, image in drawn], [scene for scene, _ in drawn]) >= 0.99
    sizes = [[each.size for each in read(image)] == [each.size for each in scene] for scene, image in drawn]
    assert sum(sizes) / len(drawn) >= 0.99


def test_the_analysis_does_not_accept_other_scenes():
    for scene, image in scenes(100, seed=4):
        seen = read(image)
        assert not any(same(seen, other) for other in [(), *SCENES] if not same(scene, other))
    assert read(Image.new("RGB", (SIDE, SIDE), "white")) == ()


@dataclass(frozen=True)
class Trained:
    """The trained model, and 64 images for each guidance scale."""

    autoencoder: Autoencoder
    pictures: dict[float, list[Image.Image]]


def run(script: str, *arguments: str) -> None:
    """Run a script or module of the project in a process with one thread; more are slower at this size."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    module = [] if script.endswith(".py") else ["-m"]
    subprocess.run([sys.executable, *module, script, *arguments], cwd=ROOT, env=environment, check=True)


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
    model, prompts = TextToImage.load(folder / "ldm" / "model"), [caption(scene) for scene in SCENES]
    pictures = {s: model(prompts, guidance_scale=s, batch_size=32, seed=0) for s in (0.0, 1.0, 3.0, 7.0)}
    report(folder, pictures)
    return Trained(model.autoencoder, pictures)


def report(folder: Path, pictures: dict[float, list[Image.Image]]) -> None:
    """Write the measured fractions, and the images at guidance scale 3, for docs/shapes.md."""
    shares = {scale: correct(images, SCENES) for scale, images in pictures.items()}
    measured = {
        "right_by_guidance_scale": shares,
        "right_with_size_at_3": sum(read(i) == s for i, s in zip(pictures[3.0], SCENES, strict=True)) / len(SCENES),
        "right_single_objects_at_3": correct(pictures[3.0][:16], SCENES[:16]),
        "right_unseen_pairs_at_3": correct(pictures[3.0][16:], UNSEEN),
        "right_with_shuffled_captions_at_3": correct(pictures[3.0], SHUFFLED),
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(json.dumps(measured, indent=2))
    enlarged = [image.resize((3 * SIDE, 3 * SIDE), Image.Resampling.NEAREST) for image in pictures[3.0]]
    grid(enlarged, 8, [caption(scene) for scene in SCENES]).quantize(64).save(folder / "samples.png", optimize=True)


@pytest.mark.slow
def test_the_autoencoder_preserves_colors_and_shapes(trained):
    drawn = scenes(200, seed=5)
    posteriors = [trained.autoencoder.encode(image_to_tensor(image)[None]) for _, image in drawn]
    again = [tensor_to_image(trained.autoencoder.decode(posterior.mode())[0]) for posterior in posteriors]
    assert correct(again, [scene for scene, _ in drawn]) >= 0.97


@pytest.mark.slow
def test_images_show_their_caption_at_guidance_scale_3(trained):
    assert correct(trained.pictures[3.0], SCENES) >= 0.9


@pytest.mark.slow
def test_images_of_unseen_pairs_show_their_caption(trained):
    assert correct(trained.pictures[3.0][16:], UNSEEN) >= 0.85


@pytest.mark.slow
def test_images_without_guidance_do_not_show_the_caption(trained):
    """At guidance scale 0 the model is unconditional."""
    assert correct(trained.pictures[0.0], SCENES) <= 0.1


@pytest.mark.slow
def test_images_do_not_show_other_captions(trained):
    assert correct(trained.pictures[3.0], SHUFFLED) <= 0.1
