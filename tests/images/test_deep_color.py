"""Deep color: 16-bit values become the nearest 8-bit values, for all byte orders, compressions and transparency."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stipple_core.images.images import UnusableImage, load_image
from tests.helpers.data.image_files import encoded, pixels, png_file, tiff_file

BACKGROUND = (0, 100, 200)


def numbers(*shape: int) -> np.ndarray:
    """Random 16-bit values, including the extremes."""
    values = np.random.default_rng(0).integers(0, 65536, shape)
    values.flat[:6] = [0, 65535, 255, 256, 257, 32896]
    return values


def scaled(values: np.ndarray) -> np.ndarray:
    return np.rint(values / 257).astype(int)


@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_png_colors_are_rounded_to_the_nearest_level(interlaced):
    values = numbers(5, 7, 3)
    file = png_file(7, 5, 16, 2, values.astype(">u2").tobytes())
    if interlaced:  # the first pass of a 1 x 1 image is the whole image
        values = values[:1, :1]
        data = bytearray(png_file(1, 1, 16, 2, values.astype(">u2").tobytes()).getvalue())
        data[28] = 1
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        file = io.BytesIO(data)
    assert (pixels(load_image(file)) == scaled(values)).all()


def test_16_bit_png_alpha_is_composited():
    values = numbers(4, 4, 4)
    values[..., 3] = np.where(np.arange(16).reshape(4, 4) % 2, 65535, 0)
    for color, kept in ((6, values), (4, values[..., [0, 3]])):
        loaded = pixels(load_image(png_file(4, 4, 16, color, kept.astype(">u2").tobytes()), BACKGROUND))
        colors = scaled(kept[..., :-1]) * np.ones(3, dtype=int)
        assert (loaded == np.where(kept[..., -1:], colors, BACKGROUND)).all()


def test_a_transparent_16_bit_color_shows_the_background_and_its_neighbor_does_not():
    data = struct.pack(">6H", 30000, 12345, 60000, 30000, 12345, 60001)
    loaded = load_image(png_file(2, 1, 16, 2, data, (b"tRNS", struct.pack(">3H", 30000, 12345, 60000))), BACKGROUND)
    assert loaded.getpixel((0, 0)) == BACKGROUND and loaded.getpixel((1, 0)) == (117, 48, 233)


@pytest.mark.parametrize(("depth", "row"), [(1, b"\x40"), (2, b"\x10"), (4, b"\x01"), (8, b"\x00\x01")])
def test_transparent_gray_of_any_depth_shows_the_background(depth, row):
    file = png_file(2, 1, depth, 0, row, (b"tRNS", struct.pack(">H", 1)))
    assert [load_image(file, BACKGROUND).getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), BACKGROUND]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_tiff_colors_are_rounded_to_the_nearest_level(order, deflate):
    values = numbers(5, 7, 3)
    assert (pixels(load_image(tiff_file(values, order, deflate))) == scaled(values)).all()
    with_alpha = np.concatenate([values, np.full((5, 7, 1), 65535)], axis=2)
    assert (pixels(load_image(tiff_file(with_alpha, order, deflate, extra=2))) == scaled(values)).all()


@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_tiff_planes_are_an_error(deflate):
    with pytest.raises(UnusableImage, match="separate planes"):
        load_image(tiff_file(numbers(5, 7, 3), "<", deflate, planar=True))


@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_tiff_orientation_is_applied(deflate):
    values = numbers(5, 7, 3)
    turned = tiff_file(np.rot90(values), "<", deflate, orientation=6)  # 6: must be rotated clockwise
    assert (pixels(load_image(turned)) == scaled(values)).all()


def test_paths_are_read_like_open_files(tmp_path):
    values = numbers(5, 7, 3)
    (tmp_path / "deep.png").write_bytes(png_file(7, 5, 16, 2, values.astype(">u2").tobytes()).getvalue())
    assert (pixels(load_image(str(Path(tmp_path / "deep.png")))) == scaled(values)).all()


def test_pixels_without_a_defined_range_are_an_error():
    for mode in ("I", "F"):
        with pytest.raises(UnusableImage, match="no defined range"):
            load_image(encoded(Image.new(mode, (4, 4), 1000), "TIFF"))
