"""Fuzzing: for any bytes, `load_image` returns RGB pixels or raises UnusableImage, within its limit of pixels."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import stipple_core.images.images
from stipple_core.images.images import UnusableImage, load_image, read_size
from tests.helpers.data.image_files import encoded, png_file, random_image, tiff_file

CAP = 1 << 20  # pixels; images up to the real limit may take a second to decode
INTERESTING = (0, 1, 2, 4, 8, 16, 127, 128, 255, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def seeds() -> list[bytes]:
    """One small file of each kind that Pillow writes, and some kinds that it only reads."""
    color = random_image(20, 16)
    gray, palette, alpha = color.convert("L"), color.quantize(16), color.convert("RGBA")
    deep = np.random.default_rng(0).integers(0, 65536, (16, 20, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [gray.convert("RGB")]}
    files = [encoded(color, "JPEG", exif=exif), encoded(color, "JPEG", progressive=True), encoded(gray, "JPEG")]
    files += [encoded(color.convert("CMYK"), "JPEG"), encoded(color, "MPO", **frames)]
    files += [encoded(image) for image in (color, gray, palette, alpha, color.convert("1"), color.convert("LA"))]
    files += [encoded(color, exif=exif), encoded(palette, transparency=3), encoded(color, **frames)]
    files += [png_file(20, 16, 16, 2, deep.astype(">u2").tobytes(), (b"tRNS", b"\0\1\0\2\0\3"))]
    files += [png_file(20, 16, 16, 0, deep[..., 0].astype(">u2").tobytes(), (b"tRNS", b"\0\1"))]
    files += [
        encoded(color, "WEBP"),
        encoded(alpha, "WEBP", lossless=True, exif=exif),
        encoded(color, "WEBP", **frames),
    ]
    files += [
        encoded(palette, "GIF"),
        encoded(palette, "GIF", interlace=1, transparency=2),
        encoded(color, "GIF", **frames),
    ]
    files += [encoded(image, "BMP") for image in (color, palette, color.convert("1"), alpha)]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files.append(encoded(color, "TIFF", compression=compression, exif=exif))
    files += [encoded(color.convert("1"), "TIFF", compression="group4"), encoded(color.convert("LAB"), "TIFF")]
    files += [tiff_file(deep, order, deflate) for order in "<>" for deflate in (False, True)]
    files += [encoded(Image.fromarray(deep[..., 0].astype(np.uint16)), "TIFF")]
    return [file.getvalue() for file in files]


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Replace bytes or numbers, cut out or repeat parts, mostly near the header, and fix most PNG checksums."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = min(draw.randrange(len(data)), draw.randrange(len(data)))
        kind = draw.randrange(6)
        if kind < 2:
            data[at] = draw.randrange(256)
        elif kind == 2:
            form = draw.choice(("<H", ">H", "<I", ">I"))
            number = draw.choice(INTERESTING) & (256 ** struct.calcsize(form) - 1)
            data[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 3:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 4 and len(data) > 8:
            del data[at : at + draw.randint(1, 16)]
        else:
            data[at:at] = data[at : at + draw.randint(1, 16)]
        data = data or bytearray(b"\0")
    if draw.random() < 0.15:
        del data[draw.randrange(len(data)) :]
    return with_checksums(data) if data.startswith(b"\x89PNG") and draw.random() < 0.8 else bytes(data)


def with_checksums(data: bytearray) -> bytes:
    """A PNG whose chunks have valid checksums, so that the decoder reads the damaged chunks."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def fuzz(count: int, seed: int) -> Counter:
    """Count the inputs that were decoded and those that were unusable by kind of reason; any other error is raised."""
    draw, originals, outcomes = random.Random(seed), seeds(), Counter()
    for _ in range(count):
        data = mutated(draw, draw.choice(originals))
        try:
            image = load_image(io.BytesIO(data), (1, 2, 3))
            assert image.mode == "RGB" and image.width * image.height <= CAP
            assert min(read_size(io.BytesIO(data))) > 0
            outcomes["pixels"] += 1
        except UnusableImage as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 400
            outcomes[str(error).partition(":")[0]] += 1
    return outcomes


@pytest.fixture
def capped(monkeypatch):
    monkeypatch.setattr(stipple_core.images.images, "MAX_PIXELS", CAP)


def test_every_seed_is_decoded():
    for data in seeds():
        assert load_image(io.BytesIO(data)).mode == "RGB"


def test_damaged_images_are_decoded_or_unusable(capped):
    outcomes = fuzz(4_000, seed=0)
    assert len(outcomes) >= 4 and outcomes["pixels"] > 400 and outcomes["can't be decoded"] > 400


@pytest.mark.slow
def test_a_million_damaged_images_are_decoded_or_unusable(capped):
    started = time.perf_counter()
    outcomes = fuzz(1_000_000, seed=1)
    print(f"{1_000_000 / (time.perf_counter() - started):.0f} executions per second; {dict(outcomes)}")
