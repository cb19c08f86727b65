"""Small image files for tests, in the formats that Pillow writes and in some that it only reads."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from stipple_core.randomness import generator


def random_image(width: int = 12, height: int = 8) -> Image.Image:
    """An RGB image of noise, the same each time."""
    values = torch.randint(0, 256, (height, width, 3), generator=generator(0, "picture")).to(torch.uint8)
    return Image.fromarray(values.numpy())


def encoded(image: Image.Image, form: str = "PNG", **options) -> io.BytesIO:
    """An image as the contents of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def pixels(image: Image.Image) -> np.ndarray:
    """Pixel values [H, W, C] as integers."""
    return np.asarray(image).astype(int)


def png_file(width: int, height: int, depth: int, color: int, data: bytes, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG file with the given bit depth, color type and raw rows, also of kinds that Pillow does not write."""
    rows = [data[i : i + len(data) // height] for i in range(0, len(data), len(data) // height)] if data else []
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts
    )
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)


def tiff_file(
    values: np.ndarray, order: str = "<", deflate: bool = False, planar: bool = False, **tags: int
) -> io.BytesIO:
    """A TIFF file of 16-bit values [H, W, C], which Pillow does not write for color."""
    height, width, channels = values.shape
    planes = [values[..., c] for c in range(channels)] if planar else [values]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    names = {"orientation": (274, 3), "extra": (338, 3), "photometric": (262, 3)}
    lists = {256: (4, [width]), 257: (4, [height]), 258: (3, [16] * channels), 259: (3, [8 if deflate else 1])}
    lists |= {262: (3, [2]), 277: (3, [channels]), 278: (4, [height]), 284: (3, [2 if planar else 1])}
    lists |= {names[name][0]: (names[name][1], [value]) for name, value in tags.items()}
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
