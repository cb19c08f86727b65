"""The source files of an image are decoded once, whatever reads them, and the three rooms are passed once each."""

import os

import pytest
from PIL import Image

from ldm import pipeline
from ldm.sampling import source_images
from ldm.sampling.source_images import DecodedFiles
from tests.helpers.models.small_models import SIDE, build_model


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Paths of the files that are decoded from here on."""
    paths, load_image = [], source_images.load_image
    monkeypatch.setattr(source_images, "load_image", lambda file, *rest: paths.append(file) or load_image(file, *rest))
    return paths


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """An image, and a mask whose left half is white."""
    Image.new("RGB", (SIDE, SIDE), "teal").save(tmp_path / "image.png")
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    mask.save(tmp_path / "mask.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("image", "mask")}


def test_generate_decodes_each_source_file_once(decoded, files, tmp_path):
    model = build_model(tmp_path)
    assert len(list(model.generate("a red heart", num_images=3, steps=2, **files))) == 3
    assert sorted(decoded) == sorted(files.values())


def test_generate_decodes_each_pil_image_once(decoded, files, tmp_path):
    model, images = build_model(tmp_path), {name: Image.open(path) for name, path in files.items()}
    (first,) = model.generate("a red heart", steps=2, **files)
    decoded.clear()
    (second,) = model.generate("a red heart", steps=2, **images)
    assert len(decoded) == len(images) and second.image == first.image


def test_images_with_files_of_their_own_decode_each_file_once(decoded, files, tmp_path):
    model = build_model(tmp_path)
    planned = [picture for path in files.values() for picture in model.plan("a", image=path, strength=0.5, steps=2)]
    for batch in model.batches(planned, 1):
        *_, last = model.sample(batch)
        list(model.finish(batch, last.z))
    assert sorted(decoded) == sorted(files.values())


def test_a_file_that_has_changed_is_decoded_again(decoded, files):
    cache, path = DecodedFiles(), files["image"]
    assert cache.decode("image", path) is cache.decode("image", path) and len(decoded) == 1
    Image.new("RGB", (SIDE, SIDE), "red").save(path)
    os.utime(path, ns=(1, 1))
    assert cache.decode("image", path).getpixel((0, 0)) == (255, 0, 0) and len(decoded) == 2


def test_a_pil_image_that_has_changed_is_decoded_again(decoded, files):
    cache, image = DecodedFiles(), Image.open(files["image"])
    assert cache.decode("image", image) is cache.decode("image", image.copy()) and len(decoded) == 1
    image.paste("red", (0, 0, SIDE, SIDE))
    assert cache.decode("image", image).getpixel((0, 0)) == (255, 0, 0) and len(decoded) == 2


def test_decoded_files_are_dropped_oldest_first_beyond_the_limit(decoded, files, monkeypatch):
    monkeypatch.setattr(source_images, "CACHED_PIXELS", SIDE * SIDE)
    cache = DecodedFiles()
    for path in (files["image"], files["mask"], files["mask"], files["image"]):
        cache.decode("image", path)
    assert decoded == [files["image"], files["mask"], files["image"]]


def test_a_prompt_passes_plan_run_and_decoding_once_each(monkeypatch, tmp_path):
    model, passed = build_model(tmp_path), []
    for name in ("plan", "run", "finish"):
        room = getattr(pipeline, name)
        monkeypatch.setattr(pipeline, name, lambda *args, n=name, r=room, **more: passed.append(n) or r(*args, **more))
    model("a red heart", steps=2)
    assert passed == ["plan", "run", "finish"]
