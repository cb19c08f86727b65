"""Enlarging: by the model's factor, for any size, with noise on the image; and models that cannot."""

import numpy as np
import pytest
from PIL import Image

import stipple.commands.upscale as upscale
from conditioning import Unconditional
from conditioning.formats.unet_inputs import with_hints
from conditioning.hints.degradation import DegradationConfig
from conditioning.hints.hints import HINTS, SpatialConfig
from tests.helpers.models.drawn import build, folder_of, photo, pixels, refused, run


@pytest.fixture(scope="module")
def model():
    return build("low_resolution")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return folder_of("low_resolution", tmp_path_factory.mktemp("upscaler"))


@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_the_result_is_larger_by_the_factor_of_the_model(model, size):
    (made,) = model("", image=photo(*size), steps=2)
    assert made.size == (4 * size[0], 4 * size[1])


def test_image_and_noise_level_affect_the_result_and_the_noise_is_reproducible(model):
    plain, other, noisy, again = (
        pixels(model("", image=photo(8, 8, seed), noise_level=level, steps=2)[0])
        for seed, level in ((0, 0.0), (1, 0.0), (0, 0.4), (0, 0.4))
    )
    assert (plain != other).any() and (plain != noisy).any() and np.array_equal(noisy, again)


def test_back_projection_makes_the_result_match_the_image(model):
    small = photo(8, 8)
    as_made, agreed = (
        pixels(model("", image=small, steps=2, back_projection=rounds)[0].resize((8, 8), Image.Resampling.BICUBIC))
        for rounds in (0, 12)
    )
    off = [np.abs(x.astype(float) - pixels(small)).mean() for x in (as_made, agreed)]
    assert off[1] < 0.25 * off[0]
    assert model.plan("", image=small)[0].back_projection == 3
    for asked in ({"noise_level": 0.2}, {"mask": Image.new("L", (8, 8), 255)}):  # invented detail is kept
        assert model.plan("", image=small, **asked)[0].back_projection == 0
    with pytest.raises(ValueError, match="requires an image to enlarge, and there is none"):
        model.plan("")
    with pytest.raises(ValueError, match="back projection 2 is for models that enlarge; leave it out"):
        build("text").plan("", image=small, back_projection=2)
    with pytest.raises(ValueError, match="back projection 101 must be between 0"):
        model.plan("", image=small, back_projection=101)


def test_models_of_blurred_or_noisy_images_use_no_back_projection():
    config = SpatialConfig(kind="low_resolution", downsampling=1, degradation=DegradationConfig(kind="bsrgan"))
    assert HINTS["low_resolution"](config).back_projection == 0
    assert with_hints(Unconditional(), 3, 3, 4).hint.back_projection == 0  # LDM's bsr_sr, of whatever damage


def test_large_results_are_made_in_windows(model):
    (made,) = model("", image=photo(24, 8), window=8, overlap=4, steps=2)
    assert made.size == (96, 32)


def test_the_command_redraws_from_its_record(checkpoint, tmp_path, capsys):
    photo(8, 8).save(tmp_path / "small.png")
    words = (tmp_path / "small.png", "--checkpoint", checkpoint, "--noise-level", 0.2, "--steps", 2)
    (path,) = run(upscale.main, capsys, tmp_path / "out", *words)
    assert Image.open(path).size == (32, 32)
    (again,) = run(upscale.main, capsys, tmp_path / "out", "--like", path)
    assert again.read_bytes() == path.read_bytes()


def test_invalid_requests_are_one_line(checkpoint, tmp_path, tmp_path_factory, capsys):
    photo(8, 8).save(tmp_path / "small.png")
    text = folder_of("text", tmp_path_factory.mktemp("text"))
    for words, expected in (
        ([], "there is no image; give one, as in: stipple upscale small.png"),
        ([tmp_path / "small.png", "--checkpoint", text], "this model was not trained to enlarge pictures; give one"),
        (
            [tmp_path / "small.png", "--checkpoint", checkpoint, "--noise-level", 0.9],
            "noise level 0.9 exceeds that of this",
        ),
    ):
        assert expected in refused(upscale.main, capsys, tmp_path / "out", *words)
