"""Reading image files as float tensors [3, H, W] in [-1, 1], and back; grids of images.

All decoding of training images happens here and in `stipple_core.images.deep_color`. Color profiles are not applied:
values are taken as sRGB.
"""

from __future__ import annotations

import errno
import functools
import os
import warnings
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stipple_core.images.deep_color import LOW_BYTES, is_planar, load_deep_color, narrow_gray, raw_mode

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no other decoder is ever run
MAX_PIXELS = 50_000_000  # checked on the header; Pillow only warns below 179 million
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CROPS = ("center", "random")
# error numbers that a path or a damaged file can cause; any other is a fault of the system and is raised
FILE_ERRORS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EOVERFLOW,
}
OUT_OF_MEMORY = "out of memory"  # a codec's message, also if a damaged file requests too much


class UnusableImage(ValueError):
    """A file that can't be used as an image. The message is the reason."""


def read_size(source: str | IO[bytes]) -> tuple[int, int]:
    """Width and height of the upright image, from the header alone. Raises as `load_image` does."""
    with _open(source) as image:
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow returns a TIFF's upright size
        return image.size[::-1] if turned else image.size


def load_image(source: str | IO[bytes], background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode the first frame of a file to an upright PIL RGB image.

    The EXIF orientation is applied, alpha is composited over `background`, and 16-bit values are scaled by 1/257.

    Raises:
        UnusableImage: the file can't be used; the message is the reason.
        OSError: the system fails, such as too many open files or no memory. The image may be fine.
    """
    with _open(source) as image:
        try:
            if is_planar(image):
                raise UnusableImage("can't be decoded: 16-bit color with separate planes for the channels")
            stored = raw_mode(image)
            decoded = load_deep_color(image, lambda: _open(source)) if stored in LOW_BYTES else image
            decoded.load()
            transpose = TRANSPOSE.get(_orientation(image, whole=True))
            decoded = _to_rgb(decoded, background, stored)
        except UnusableImage:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, IndexError, struct.error, ... on damaged data
            raise _classified(error) from None
    return decoded if transpose is None else decoded.transpose(transpose)


def load_map(path: str) -> Image.Image:
    """Decode a map: a file of one channel, such as class numbers, or depths of 8 or 16 bits.

    The values of a palette image are its indices. Raises as `load_image` does, and UnusableImage if the file has
    several channels.
    """
    with _open(path) as image:
        if len(image.getbands()) != 1:
            raise UnusableImage(f"a map has one channel, this one has {''.join(image.getbands())}")
        try:
            image.load()
        except Exception as error:
            raise _classified(error) from None
        return image


def _open(source: str | IO[bytes]) -> Image.Image:
    try:
        if not isinstance(source, str):
            source.seek(0)
        _ignore_warnings()
        image = Image.open(source, formats=FORMATS)
    except Exception as error:
        raise _classified(error) from None
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        image.close()
        kind = "too many" if width * height else "no"
        raise UnusableImage(f"{kind} pixels: {width} x {height}, at most {MAX_PIXELS // 1_000_000} million")
    return image


@functools.cache
def _ignore_warnings() -> None:
    """Silence Pillow for the whole process: `warnings.catch_warnings` is not safe with threads.

    Its warnings are about large images, for which MAX_PIXELS is checked, and about metadata.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _classified(error: Exception) -> UnusableImage | OSError:
    """UnusableImage if the file caused an error, OSError if the system did. Pillow's own OSErrors have no number."""
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError) and error.errno and error.errno not in FILE_ERRORS:
        return error
    return UnusableImage(_reason(error))


def _reason(error: Exception) -> str:
    """The kind of error, then ":" and details."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a directory, not a file"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {' '.join(str(error).split())[:100]}"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known format: {', '.join(FORMATS)}"
    return f"can't be decoded: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _orientation(image: Image.Image, whole: bool = False) -> int:
    """The EXIF orientation.

    Unless `whole`, only the header of a PNG is searched: Pillow decodes the pixels to find EXIF data behind them.
    """
    try:
        exif = image.getexif() if whole else Image.Image.getexif(image)
        return int(exif.get(ORIENTATION, 1))
    except Exception as error:  # some cameras and editors write broken EXIF data
        classified = _classified(error)
        if isinstance(classified, OSError):
            raise classified from None
        return 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int], stored: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        raise UnusableImage("pixels have no defined range: 32-bit or signed values")
    if image.mode.startswith("I"):
        image = narrow_gray(image, 12 if stored == "I;12" else 16)
    if stored in ("L;2", "L;4") and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= 255 // (2 ** int(stored[2]) - 1)  # Pillow scales the pixels but not this value
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL RGB image as float32 [3, H, W] in [-1, 1]."""
    # numpy: torch uses several threads for this, which took 47 ms instead of 0.1 ms on a machine with busy cores
    values = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # [3, H, W]
    values /= 127.5
    values -= 1
    return torch.from_numpy(values)


def tensor_to_image(image: torch.Tensor) -> Image.Image:
    """A float tensor [3, H, W] in [-1, 1] as a PIL RGB image; values are rounded and clamped, NaN becomes mid-gray."""
    values = np.nan_to_num(image.detach().float().cpu().numpy(), nan=0.0, posinf=1.0, neginf=-1.0)
    pixels = np.rint((values + 1) * np.float32(127.5)).clip(0, 255).astype(np.uint8)  # [3, H, W]
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Arrange images in rows of `columns`, 4 white pixels apart, with an optional wrapped caption below each."""
    if not images or columns < 1:
        raise ValueError(f"a grid needs at least one image and one column, not {len(images)} and {columns}")
    gutter, line = 4, 12
    width, height = max(i.width for i in images), max(i.height for i in images)
    font = ImageFont.load_default(size=10) if captions else None
    texts = [_wrap(caption, width, font) for caption in captions] if captions else [[]] * len(images)
    strip = max(map(len, texts)) * line
    rows = -(-len(images) // columns)
    size = (gutter + columns * (width + gutter), gutter + rows * (height + strip + gutter))
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for position, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = gutter + position % columns * (width + gutter)
        top = gutter + position // columns * (height + strip + gutter)
        canvas.paste(image, (left, top))
        for row, words in enumerate(text):
            draw.text((left, top + height + row * line), words, fill=(0, 0, 0), font=font)
    return canvas


def _wrap(caption: str, width: int, font: ImageFont.ImageFont, lines: int = 3) -> list[str]:
    """Wrap text to at most `lines` lines of `width` pixels; longer words and further lines are cut off."""
    wrapped: list[str] = []
    for word in caption[:200].split():
        joined = f"{wrapped[-1]} {word}" if wrapped else word
        if wrapped and font.getlength(joined) <= width:
            wrapped[-1] = joined
            continue
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-1]
        wrapped.append(word)
    return wrapped[:lines]
