"""Inpainting: what is kept and what is repainted, by blending and by models conditioned on a mask."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import stipple.commands.inpaint as inpaint
from ldm import TextToImage
from tests.helpers.models.drawn import build, folder_of, mask, photo, pixels, refused, run


@pytest.fixture(scope="module")
def models():
    return {kind: build(kind) for kind in ("text", "inpainting")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return folder_of("text", tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("kind", ["text", "inpainting"])
@pytest.mark.parametrize("size", [(32, 32), (30, 21)])
def test_pixels_outside_the_mask_do_not_change(models, kind, size):
    image, hole = photo(*size), mask(*size)
    (made,) = models[kind]("a heart", image=image, mask=hole, steps=3)
    kept = pixels(hole) == 0
    assert made.size == size and np.array_equal(pixels(made)[kept], pixels(image)[kept])
    assert np.abs(pixels(made) - pixels(image))[~kept].mean() > 5


def test_feather_blends_as_many_pixels_as_it_names(models):
    image, hole = photo(32, 32), mask(32, 32)
    hard, soft = (models["text"]("a heart", image=image, mask=hole, feather=n, steps=3)[0] for n in (0, 4))
    changed = np.abs(pixels(soft) - pixels(hard)).sum((0, 2)) > 0  # of each column
    assert not changed[:12].any() and changed[12:16].any() and not changed[16:].any()
    far = np.abs(pixels(soft) - pixels(image)).sum((0, 2))
    assert far[15] > far[12]


def test_the_kept_part_affects_the_repainted_one_and_a_full_mask_keeps_nothing(models):
    hole, whole = mask(32, 32), Image.new("L", (32, 32), 255)
    one, other = (models["text"]("a heart", image=photo(32, 32, seed), mask=hole)[0] for seed in (0, 1))
    assert (pixels(one) != pixels(other))[:, 16:].any()
    (alone,), (painted,) = models["text"]("a heart"), models["text"]("a heart", image=photo(32, 32), mask=whole)
    assert np.array_equal(pixels(alone), pixels(painted))


def test_resample_multiplies_the_steps(models):
    settings = dict(image=photo(32, 32), mask=mask(32, 32), steps=4)
    (picture,) = models["text"].plan("a heart", resample=3, **settings)
    steps = list(models["text"].sample([picture]))
    assert len(steps) == models["text"].steps(picture) == 12
    (once,), (again,) = (models["text"]("a heart", resample=n, **settings) for n in (1, 3))
    assert (pixels(once) != pixels(again)).any()


def test_an_inpainting_model_is_conditioned_on_the_mask_instead_of_blended(models, monkeypatch):
    """The model is conditioned on the mask and on the pixels outside it, and on none inside."""
    model = models["inpainting"]
    (picture,) = model.plan("a heart", image=photo(32, 32), mask=mask(32, 32), steps=1)
    inputs, encode = [], model.conditioner.encode
    monkeypatch.setattr(model.conditioner, "encode", lambda prompts, x: inputs.append(x) or encode(prompts, x))
    list(model.sample([picture]))
    hint = inputs[0].hint
    assert hint.shape == (1, 4, 32, 32) and torch.equal(hint[0, 3] > 0, torch.from_numpy(pixels(mask(32, 32)) > 0))
    assert (hint[0, :3, :, 16:] == 0).all() and (hint[0, :3, :, :16] != 0).any()
    assert picture.strength == 1


def test_the_command_redraws_from_its_record(checkpoint, tmp_path, capsys):
    photo(32, 32).save(tmp_path / "photo.png")
    mask(32, 32).save(tmp_path / "mask.png")
    words = (tmp_path / "photo.png", tmp_path / "mask.png", "a heart", "--checkpoint", checkpoint, "--resample", 2)
    (path,) = run(inpaint.main, capsys, tmp_path / "out", *words, "--steps", 3, "--feather", 2)
    (again,) = run(inpaint.main, capsys, tmp_path / "out", "--like", path)
    assert again.read_bytes() == path.read_bytes()


BAD = {
    "no mask": (
        ["{tmp}/photo.png"],
        "there is no mask; give one, as in: stipple inpaint photo.png mask.png",
    ),
    "another size": (
        ["{tmp}/photo.png", "{tmp}/small.png"],
        "the mask has 8 x 8 pixels, the image 32 x 32; give a",
    ),
    "no white": (["{tmp}/photo.png", "{tmp}/black.png"], "the mask has no white, and white is what is painted"),
    "resample 0": (["{tmp}/photo.png", "{tmp}/mask.png", "--resample", "0"], "resample 0 must be at least 1"),
    "feather": (["{tmp}/photo.png", "{tmp}/mask.png", "--feather", "-1"], "feather -1 must be between 0 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_requests_are_one_line(name, checkpoint, tmp_path, capsys):
    photo(32, 32).save(tmp_path / "photo.png")
    mask(32, 32).save(tmp_path / "mask.png")
    mask(8, 8).save(tmp_path / "small.png")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    words, expected = BAD[name]
    words = [word.format(tmp=tmp_path) for word in words]
    assert expected in refused(inpaint.main, capsys, tmp_path / "out", "--checkpoint", checkpoint, *words)


def test_a_reader_encodes_images_on_the_device_of_the_autoencoder_and_keeps_no_model_alive(models):
    """The hints of a conditioner without weights stay on the device they are made on; "meta" stands for a GPU."""
    made = models["inpainting"]
    autoencoder, reader = copy.deepcopy(made.autoencoder).to("meta"), made.conditioner.readers["spatial"]
    unet = copy.deepcopy(made.unet)
    kept, encode = weakref.ref(unet), reader.encode
    TextToImage(autoencoder, unet, made.conditioner, made.scheduling)
    assert reader.encode(torch.zeros(1, 3, 32, 32)).device.type == "meta"
    del unet
    gc.collect()
    assert kept() is None
    made.conditioner.bind_encoder(encode)


def test_the_opaque_part_of_a_transparent_mask_is_repainted(models):
    image, hole = photo(32, 32), mask(32, 32)
    layer = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    layer.putalpha(hole)
    one, other = (models["text"]("a heart", image=image, mask=each, steps=2)[0] for each in (hole, layer))
    assert np.array_equal(pixels(one), pixels(other))


def test_a_colored_mask_is_refused(models):
    with pytest.raises(ValueError, match="the mask has colors.*swapped"):
        models["text"].plan("a heart", image=mask(32, 32).convert("RGB"), mask=photo(32, 32))
        models["text"]("a heart", image=mask(32, 32).convert("RGB"), mask=photo(32, 32))
