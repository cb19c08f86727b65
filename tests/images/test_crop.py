"""Crops: an image and its map are cropped alike, and the frame describes the crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stipple_core.images.crop import Crop
from stipple_core.images.images import UnusableImage, load_map


def ramp(width: int, height: int) -> Image.Image:
    """An image whose red values are the column and whose green values are the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [24, (40, 20), (20, 40)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_map_is_cropped_like_its_image(size, crop, flip):
    image = ramp(120, 80)
    cropped = Crop.covering(image.size, size, crop, flip, torch.Generator().manual_seed(3))
    columns = cropped.map(image.getchannel("R"))[0]
    assert columns.shape == cropped.image(image).shape[1:]
    resized = (cropped.image(image)[0] + 1) * 127.5  # antialiased, unlike the map: differs by one cell at most
    assert (columns - resized).abs().max() <= 120 / columns.shape[1] + 1


def test_a_map_of_another_resolution_covers_the_same_area():
    picture, labels = Image.new("RGB", (100, 50)), Image.new("L", (10, 5))
    labels.paste(7, (5, 0, 10, 5))  # the right half
    cut = Crop.covering(picture.size, 50).map(labels)[0]
    assert cut.shape == (50, 50)
    assert (cut[:, :25] == 0).all() and (cut[:, 25:] == 7).all()


def test_map_values_are_not_interpolated():
    numbers = Image.fromarray(np.random.default_rng(0).integers(0, 2, (90, 90), dtype=np.uint8) * 200)
    assert set(Crop.covering((90, 90), 31).map(numbers).unique().tolist()) == {0.0, 200.0}


def test_the_frame_is_size_crop_and_target_size():
    assert Crop.covering((64, 64), 64).frame == (64, 64, 0, 0, 64, 64)
    assert Crop.covering((200, 100), 50).frame == (100, 200, 0, 25, 50, 50)  # 100 x 50 after resizing
    assert Crop.covering((100, 300), 100).frame == (300, 100, 100, 0, 100, 100)


def test_the_frame_of_a_mirrored_image_is_that_of_the_mirrored_image():
    draw = torch.Generator().manual_seed(1)
    straight = Crop.covering((200, 100), 50, "random", False, draw)
    mirrored = Crop.covering((200, 100), 50, "random", True, torch.Generator().manual_seed(1))
    assert straight.frame[3] + mirrored.frame[3] == 50  # the widths cropped at both sides
    assert straight.frame[3] not in (0, 25, 50)


def test_a_map_of_three_channels_is_an_error(tmp_path):
    ramp(8, 8).save(tmp_path / "a.png")
    with pytest.raises(UnusableImage, match="one channel"):
        load_map(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="one channel"):
        Crop.covering((8, 8), 8).map(ramp(8, 8))


def test_palette_and_16_bit_maps_keep_their_values(tmp_path):
    numbers = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([255, 0, 0] * 256)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(numbers.astype(np.uint16) * 1000).save(tmp_path / "deep.png")
    for name, times in (("palette", 1), ("deep", 1000)):
        cut = Crop.covering((8, 8), 8).map(load_map(str(tmp_path / f"{name}.png")))
        assert torch.equal(cut[0], torch.from_numpy(numbers.astype(np.float32) * times))
