"""The door for images: files of any usual kind to float [3, H, W] in [-1, 1], and back.

Nothing but this file and `stipple_core.images.deep_color` decodes or encodes pixels. Color profiles are not applied: values are
taken as sRGB.
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

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # nothing else is ever handed to a decoder
MAX_PIXELS = 50_000_000  # own cap, checked on the header: Pillow only warns up to 179 Mpx
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
# what a path or a damaged file can make the system say; any other number is of the system, and passes
OF_THE_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EOVERFLOW,
}
OUT_OF_MEMORY = "out of memory"  # what a codec says when there is none, or when a damaged file asks for too much


class UnusableImage(ValueError):
    """A file that can't be used as an image; the message is the reason."""


def read_size(source: str | IO[bytes]) -> tuple[int, int]:
    """Width and height of the upright picture, from the header alone; raises as `load_image` does."""
    with _open(source) as image:
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow gives a TIFF's upright size itself
        return image.size[::-1] if turned else image.size


def load_image(source: str | IO[bytes], background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode a file to an upright PIL RGB image: EXIF orientation applied, alpha over `background`, first frame only.

    16-bit gray and color are scaled by 1/257, so that 65535 becomes 255. Raises UnusableImage with the reason; OSError
    with its number where the system fails, of which nothing follows for the picture: too many open files, no memory.
    """
    with _open(source) as image:
        try:
            if is_planar(image):
                raise UnusableImage("can't be decoded: 16-bit color with each channel apart")
            stored = raw_mode(image)
            decoded = load_deep_color(image, lambda: _open(source)) if stored in LOW_BYTES else image
            decoded.load()
            transpose = TRANSPOSE.get(_orientation(image, whole=True))
            decoded = _to_rgb(decoded, background, stored)
        except UnusableImage:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, IndexError, struct.error, ... on damaged data
            raise _judged(error) from None
    return decoded if transpose is None else decoded.transpose(transpose)


def load_map(path: str) -> Image.Image:
    """Decode a map, a file of one channel whose values count: class numbers, or depths of 8 or 16 bits.

    A palette's numbers are the values. Raises UnusableImage as `load_image`, or where there are several channels.
    """
    with _open(path) as image:
        if len(image.getbands()) != 1:
            raise UnusableImage(f"a map has one channel, this has {''.join(image.getbands())}")
        try:
            image.load()
        except Exception as error:
            raise _judged(error) from None
        return image


def _open(source: str | IO[bytes]) -> Image.Image:
    try:
        if not isinstance(source, str):
            source.seek(0)
        _ignore_warnings()
        image = Image.open(source, formats=FORMATS)
    except Exception as error:
        raise _judged(error) from None
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        image.close()
        kind = "too many" if width * height else "no"
        raise UnusableImage(f"{kind} pixels: {width} x {height}, at most {MAX_PIXELS // 1_000_000} million")
    return image


@functools.cache
def _ignore_warnings() -> None:
    """Silence Pillow, once and for all: threads would undo each other's `warnings.catch_warnings`."""
    # of bombs: refused by our own cap; the rest is noise about metadata
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _judged(error: Exception) -> UnusableImage | OSError:
    """The picture's fault or the system's; Pillow gives its own OSErrors no number."""
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError) and error.errno and error.errno not in OF_THE_FILE:
        return error
    return UnusableImage(_reason(error))


def _reason(error: Exception) -> str:
    """What kind of thing is wrong, then ":" and the details."""
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
    """The EXIF orientation; of a PNG's header alone unless `whole`, as Pillow decodes it to look behind the pixels."""
    try:
        exif = image.getexif() if whole else Image.Image.getexif(image)
        return int(exif.get(ORIENTATION, 1))
    except Exception as error:  # cameras and editors write broken EXIF around good pixels
        judged = _judged(error)
        if isinstance(judged, OSError):
            raise judged from None
        return 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int], stored: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F"):
        raise UnusableImage("pixels have no stated range: numbers of 32 bits, or with a sign")
    if image.mode.startswith("I"):
        image = narrow_gray(image, 12 if stored == "I;12" else 16)
    if stored in ("L;2", "L;4") and isinstance(image.info.get("transparency"), int):
        image.info["transparency"] *= 255 // (2 ** int(stored[2]) - 1)  # Pillow scales the pixels, but not this
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL RGB image as float32 [3, H, W] in [-1, 1]."""
    # numpy, because torch would split this over threads: on a machine with busy cores that took 47 ms, not 0.1
    values = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # [3, H, W]
    values /= 127.5
    values -= 1
    return torch.from_numpy(values)


def tensor_to_image(image: torch.Tensor) -> Image.Image:
    """Float [3, H, W] in [-1, 1] as a PIL RGB image: rounded, clamped; NaN becomes mid-gray."""
    values = np.nan_to_num(image.detach().float().cpu().numpy(), nan=0.0, posinf=1.0, neginf=-1.0)
    pixels = np.rint((values + 1) * np.float32(127.5)).clip(0, 255).astype(np.uint8)  # [3, H, W]
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Images in rows of `columns`, 4 white pixels apart; a caption under each, wrapped to its width, when given."""
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
    """At most `lines` lines of whole words, none wider than `width` pixels; a longer word or rest is cut."""
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
