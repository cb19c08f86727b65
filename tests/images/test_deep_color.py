"""Deep color: every number of 16 bits becomes the nearest of 8, whatever the file's order, packing or transparency."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stipple_core.images.images import UnusableImage, load_image
from tests.images.test_images import pixels, png, stored

BACKGROUND = (0, 100, 200)


def numbers(*shape: int) -> np.ndarray:
    """Random numbers of 16 bits, the extremes among them."""
    values = np.random.default_rng(0).integers(0, 65536, shape)
    values.flat[:6] = [0, 65535, 255, 256, 257, 32896]
    return values


def scaled(values: np.ndarray) -> np.ndarray:
    return np.rint(values / 257).astype(int)


def tiff(values: np.ndarray, order: str = "<", deflate: bool = False, planar: bool = False, **tags: int) -> io.BytesIO:
    """A TIFF of 16-bit numbers [H, W, C] made by hand, which Pillow does not write for color."""
    height, width, channels = values.shape
    planes = [values[..., c] for c in range(channels)] if planar else [values]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    known = {"orientation": (274, 3), "extra": (338, 3), "photometric": (262, 3)}
    lists = {256: (4, [width]), 257: (4, [height]), 258: (3, [16] * channels), 259: (3, [8 if deflate else 1])}
    lists |= {262: (3, [2]), 277: (3, [channels]), 278: (4, [height]), 284: (3, [2 if planar else 1])}
    lists |= {known[name][0]: (known[name][1], [value]) for name, value in tags.items()}
    body, starts = b"", []
    for strip in strips:
        starts.append(8 + len(body))
        body += strip + b"\0" * (len(strip) % 2)
    lists |= {273: (4, starts), 279: (4, [len(strip) for strip in strips])}
    after = 8 + len(body) + 2 + 12 * len(lists) + 4
    entries, long = b"", b""
    for tag, (kind, content) in sorted(lists.items()):
        packed = struct.pack(f"{order}{len(content)}{'H' if kind == 3 else 'L'}", *content)
        if len(packed) > 4:
            packed, long = struct.pack(f"{order}L", after + len(long)), long + packed
        entries += struct.pack(f"{order}HHL", tag, kind, len(content)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, 8 + len(body))
    return io.BytesIO(head + body + struct.pack(f"{order}H", len(lists)) + entries + b"\0" * 4 + long)


@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_png_colors_are_rounded_to_the_nearest_level(interlaced):
    values = numbers(5, 7, 3)
    file = png(7, 5, 16, 2, values.astype(">u2").tobytes())
    if interlaced:  # the single pixel of the first pass is the whole picture
        values = values[:1, :1]
        data = bytearray(png(1, 1, 16, 2, values.astype(">u2").tobytes()).getvalue())
        data[28] = 1
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        file = io.BytesIO(data)
    assert (pixels(load_image(file)) == scaled(values)).all()


def test_16_bit_png_alpha_is_composited():
    values = numbers(4, 4, 4)
    values[..., 3] = np.where(np.arange(16).reshape(4, 4) % 2, 65535, 0)
    for color, kept in ((6, values), (4, values[..., [0, 3]])):
        loaded = pixels(load_image(png(4, 4, 16, color, kept.astype(">u2").tobytes()), BACKGROUND))
        colors = scaled(kept[..., :-1]) * np.ones(3, dtype=int)
        assert (loaded == np.where(kept[..., -1:], colors, BACKGROUND)).all()


def test_a_transparent_16_bit_color_shows_the_background_and_its_neighbor_does_not():
    data = struct.pack(">6H", 30000, 12345, 60000, 30000, 12345, 60001)
    loaded = load_image(png(2, 1, 16, 2, data, (b"tRNS", struct.pack(">3H", 30000, 12345, 60000))), BACKGROUND)
    assert loaded.getpixel((0, 0)) == BACKGROUND and loaded.getpixel((1, 0)) == (117, 48, 233)


@pytest.mark.parametrize(("depth", "row"), [(1, b"\x40"), (2, b"\x10"), (4, b"\x01"), (8, b"\x00\x01")])
def test_transparent_gray_of_any_depth_shows_the_background(depth, row):
    file = png(2, 1, depth, 0, row, (b"tRNS", struct.pack(">H", 1)))
    assert [load_image(file, BACKGROUND).getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), BACKGROUND]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_tiff_colors_are_rounded_to_the_nearest_level(order, deflate):
    values = numbers(5, 7, 3)
    assert (pixels(load_image(tiff(values, order, deflate))) == scaled(values)).all()
    with_alpha = np.concatenate([values, np.full((5, 7, 1), 65535)], axis=2)
    assert (pixels(load_image(tiff(with_alpha, order, deflate, extra=2))) == scaled(values)).all()


@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_tiff_planes_are_refused_rather_than_read_as_noise(deflate):
    with pytest.raises(UnusableImage, match="each channel apart"):
        load_image(tiff(numbers(5, 7, 3), "<", deflate, planar=True))


@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_tiff_colors_come_out_upright(deflate):
    values = numbers(5, 7, 3)
    turned = tiff(np.rot90(values), "<", deflate, orientation=6)  # 6: to be turned clockwise
    assert (pixels(load_image(turned)) == scaled(values)).all()


def test_files_are_read_alike_from_their_path(tmp_path):
    values = numbers(5, 7, 3)
    (tmp_path / "deep.png").write_bytes(png(7, 5, 16, 2, values.astype(">u2").tobytes()).getvalue())
    assert (pixels(load_image(str(Path(tmp_path / "deep.png")))) == scaled(values)).all()


def test_pixels_without_a_stated_range_are_refused():
    for mode in ("I", "F"):
        with pytest.raises(UnusableImage, match="no stated range"):
            load_image(stored(Image.new(mode, (4, 4), 1000), "TIFF"))
