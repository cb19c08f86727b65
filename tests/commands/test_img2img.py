"""Changing a picture: by how much, in how many steps, in which sizes, and what is refused."""

import numpy as np
import pytest
from PIL import Image

import stipple.commands.draw as draw
import stipple.commands.img2img as img2img
from ldm import TextToImage
from stipple_core.resources import resource
from tests.helpers.models.drawn import build, folder_of, photo, pixels, record, refused, run

EMOJI = resource("checkpoints/emoji")


@pytest.fixture(scope="module")
def model():
    return build("text")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return folder_of("text", tmp_path_factory.mktemp("text"))


def test_the_distance_to_the_picture_grows_with_strength():
    """With the shipped model; docs/tasks/commands.md shows more strengths of more pictures."""
    emoji = TextToImage.load(EMOJI)
    (heart,) = emoji("a red heart", steps=8, seed=3)
    made = [emoji("a blue fish", image=heart, strength=s, steps=8, seed=7)[0] for s in (0.25, 0.5, 0.75, 1.0)]
    distances = [np.square(pixels(image) - pixels(heart)).mean() ** 0.5 for image in made]
    assert distances == sorted(distances) and distances[0] < 30 and distances[-1] > 2 * distances[0]


def test_strength_1_is_sampling_from_noise(model):
    (plain,), (changed,) = model("a heart", seed=5), model("a heart", image=photo(32, 32), strength=1, seed=5)
    assert np.array_equal(pixels(plain), pixels(changed))


@pytest.mark.parametrize(("steps", "strength", "taken"), [(50, 0.6, 30), (100, 0.29, 29), (24, 0.75, 18), (10, 1, 10)])
def test_strength_selects_the_share_of_the_last_steps(model, steps, strength, taken):
    (whole,) = model.plan("a heart", steps=steps)
    (picture,) = model.plan("a heart", image=photo(32, 32), steps=steps, strength=strength)
    assert model.steps(picture) == taken
    times = [model.sampling_times(one).tolist() for one in (whole, picture)]
    assert times[1] == times[0][steps - taken :]


@pytest.mark.parametrize("size", [(32, 32), (30, 21), (9, 50)])
def test_the_result_has_the_size_of_the_image(model, size):
    (image,) = model("a heart", image=photo(*size), strength=0.5, steps=2)
    assert image.size == size


def test_height_and_width_crop_the_image(model):
    wide = photo(64, 32)
    (image,) = model("a heart", image=wide, strength=0.5, steps=2, height=32, width=32)
    (cut,) = model("a heart", image=wide.crop((16, 0, 48, 32)), strength=0.5, steps=2)
    assert np.array_equal(pixels(image), pixels(cut))


def test_a_path_and_a_pil_image_give_the_same_result(model, tmp_path):
    photo(32, 32).save(tmp_path / "photo.png")
    ways = (photo(32, 32), str(tmp_path / "photo.png"), tmp_path / "photo.png")
    made = [pixels(model("a heart", image=image, strength=0.5)[0]) for image in ways]
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


def test_the_command_records_image_and_strength_and_redraws_from_them(checkpoint, tmp_path, capsys):
    photo(30, 22).save(tmp_path / "photo.png")
    words = (tmp_path / "photo.png", "--steps", 4, "a heart", "--checkpoint", checkpoint)
    (path,) = run(img2img.main, capsys, tmp_path / "out", *words)
    (made,) = record(path)["pictures"]
    assert (made["image"], made["strength"], made["prompt"]) == (str(tmp_path / "photo.png"), 0.75, "a heart")
    assert "Denoising strength: 0.75" in Image.open(path).text["parameters"]
    for main in (img2img.main, draw.main):
        (again,) = run(main, capsys, tmp_path / "out", "--like", path)
        assert again.read_bytes() == path.read_bytes()
    (other,) = run(img2img.main, capsys, tmp_path / "out", "--like", path, "--strength", 0.25)
    assert other.read_bytes() != path.read_bytes()


def test_redrawing_warns_when_the_image_file_has_changed(checkpoint, tmp_path, capsys):
    photo(32, 32).save(tmp_path / "photo.png")
    words = (tmp_path / "photo.png", "a heart", "--steps", 2, "--checkpoint", checkpoint)
    (path,) = run(img2img.main, capsys, tmp_path / "out", *words)
    photo(32, 32, seed=1).save(tmp_path / "photo.png")
    img2img.main(["--like", str(path), "--outdir", str(tmp_path / "out")])
    assert f"was made of another {tmp_path / 'photo.png'}: it will differ" in capsys.readouterr().err


BAD = {
    "no image": ([], "there is no image; give one, as in: stipple img2img"),
    "no file": (["{tmp}/none.png", "a"], "image {tmp}/none.png can't be used: no such file; give another"),
    "no picture": (["{tmp}/text.png", "a"], "image {tmp}/text.png can't be used: not an image of a known format"),
    "strength 0": (["{tmp}/photo.png", "a", "--strength", "0"], "strength 0.0 must be above 0"),
    "strength 2": (
        ["{tmp}/photo.png", "a", "--strength", "2"],
        "strength 2.0 must be above 0 (the image stays) and",
    ),
    "no step": (["{tmp}/photo.png", "a", "--strength", ".1", "--steps", "4"], "is not even one; use 0.25 or more"),
    "a map": (
        ["{tmp}/photo.png", "a", "--map", "m.png"],
        "map m.png is for models that are conditioned on a map; leave it out",
    ),
    "resample": (["{tmp}/photo.png", "a", "--resample", "3"], "resample 3 requires mask; set it, or leave it out"),
    "noise": (["{tmp}/photo.png", "a", "--noise-level", ".3"], "noise level 0.3 is for models that enlarge; leave it"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_requests_are_one_line(name, checkpoint, tmp_path, capsys):
    photo(32, 32).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no picture")
    words, expected = BAD[name]
    words = [word.format(tmp=tmp_path) for word in words]
    error = refused(img2img.main, capsys, tmp_path / "out", "--checkpoint", checkpoint, *words)
    assert expected.format(tmp=tmp_path) in error
