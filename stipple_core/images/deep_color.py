"""Conversion of images with more than 8 bits per channel to 8 bits: values are scaled by 1/257 and rounded.

Pillow clips 16-bit gray at 255 when it converts it to color, and drops the low bytes of 16-bit color.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from PIL import Image

NATIVE, FOREIGN = (";16L", ";16B") if sys.byteorder == "little" else (";16B", ";16L")
COLORS = ("RGB", "RGBA", "RGBX", "CMYK")
BITS, PLANAR = 258, 284  # TIFF tags
# raw mode -> the mode that reads the other byte of each value. The bytes of LA are read as if they were colors
LOW_BYTES = {f"{color}{order}": f"{color}{other}" for color in COLORS for order, other in
             ((";16L", ";16B"), (";16B", ";16L"), (";16N", FOREIGN))} | {"LA;16B": "RGBA"}  # fmt: skip


def raw_mode(image: Image.Image) -> str:
    """Pillow's raw mode of a file that is opened but not loaded, such as "RGB;16B"; "" if unknown."""
    arguments = image.tile[0].args if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def is_planar(image: Image.Image) -> bool:
    """Whether a file is a TIFF that stores 16-bit channels one after another, which Pillow reads as 8-bit."""
    return image.format == "TIFF" and image.tag_v2.get(PLANAR) == 2 and max(image.tag_v2.get(BITS, (1,))) > 8


def load_deep_color(image: Image.Image, reopen: Callable[[], Image.Image]) -> Image.Image:
    """Load a file whose raw mode is in LOW_BYTES as an 8-bit RGB, RGBX, RGBA or CMYK image.

    Args:
        image: the opened file, not loaded.
        reopen: opens the file a second time, to read the low bytes.
    """
    mode = raw_mode(image)
    transparent = image.info.get("transparency")
    with reopen() as other:
        other.tile = [tile._replace(args=_replaced(tile.args, LOW_BYTES[mode])) for tile in other.tile]
        other.load()
        low = np.asarray(other, dtype=np.uint32)  # [H, W, C]
    image.load()
    high = np.asarray(image, dtype=np.uint32)
    if mode == "LA;16B":
        gray, alpha = low[..., 0] << 8 | low[..., 1], low[..., 2] << 8 | low[..., 3]
        return Image.merge("RGBA", [_narrow(gray)] * 3 + [_narrow(alpha)])
    values = high << 8 | low
    narrow = Image.merge(image.mode, [_narrow(values[..., channel]) for channel in range(values.shape[2])])
    if isinstance(transparent, tuple):
        hidden = (values == np.array(transparent)).all(axis=2)
        narrow.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return narrow


def narrow_gray(image: Image.Image, bits: int = 16) -> Image.Image:
    """Convert a loaded gray image of 9 to 16 bits to 8-bit L, or to LA if one value is transparent."""
    values = np.asarray(image).astype(np.int64)
    gray = _narrow(np.clip(values, 0, 2**bits - 1), bits)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _replaced(arguments: str | tuple, mode: str) -> str | tuple:
    return mode if isinstance(arguments, str) else (mode, *arguments[1:])


def _narrow(values: np.ndarray, bits: int = 16) -> Image.Image:
    """Scale and round values [H, W] of `bits` bits to an 8-bit image, in integer arithmetic."""
    top = 2**bits - 1
    return Image.fromarray(((values * 510 + top) // (2 * top)).astype(np.uint8))
