"""The source images of an image: files that are decoded, brought to the image's size, and passed to the conditioner.

An image has the size of its settings, or else that of the source image or map, times the factor of a model that
enlarges. A source of another shape is scaled to cover the image and cropped at the center. Sides that the autoencoder's
downsampling does not divide are padded by repeating the last row and column; the padding is cut off at the end.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from conditioning.hints.degradation import back_projected
from conditioning.hints.hint_files import Files
from conditioning.interface.conditioner import Conditioner
from conditioning.interface.inputs import ConditionInputs
from ldm.sampling.settings import Settings, Source
from stipple_core.images.crop import Crop
from stipple_core.images.images import UnusableImage, image_to_tensor, load_image, load_map, tensor_to_image
from stipple_core.randomness import generator

BACKGROUNDS = {"image": (255, 255, 255), "mask": (0, 0, 0)}  # transparent parts of a mask are not painted
TINT = 48  # of 255: by how much the channels of a gray pixel may differ after JPEG compression
CACHED_PIXELS = 1 << 26  # decoded pixels that are kept for later: 256 images of 512 x 512, 200 MB in RGB


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """The size of an image in pixels, and of its latents."""

    height: int
    width: int
    downsampling: int  # of the autoencoder

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the autoencoder's input."""
        f = self.downsampling
        return math.ceil(self.height / f) * f, math.ceil(self.width / f) * f

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.padded[0] // self.downsampling, self.padded[1] // self.downsampling


@dataclass
class DecodedFiles:
    """Decoded sources, so that planning, sampling and finishing an image decode each of its sources once.

    The sources that were used last are kept, up to `CACHED_PIXELS` in all. A file or PIL image that has changed is
    decoded again.
    """

    images: dict[tuple, Image.Image] = field(default_factory=dict, repr=False)  # the source that was used last is last

    def decode(self, name: str, source: Source) -> Image.Image:
        """Return a source as `image` (upright RGB), `mask` (over black where it is transparent) or `map` (as stored).

        Raises:
            ValueError: the file can't be read or used.
        """
        key = (name, *_version(source))
        self.images[key] = image = self.images.pop(key, None) or _decode(name, source)
        while len(self.images) > 1 and sum(math.prod(kept.size) for kept in self.images.values()) > CACHED_PIXELS:
            del self.images[next(iter(self.images))]
        return image


@dataclass(frozen=True, kw_only=True)
class SourceImages:
    """The decoded source files of an image; None: the image has none of the kind."""

    image: Image.Image | None = None  # RGB
    mask: Image.Image | None = None  # gray, of the image's size
    map: Image.Image | None = None  # one channel of numbers

    @classmethod
    def of(cls, picture: Settings, files: DecodedFiles) -> SourceImages:
        """Decode the source files of an image. Raises ValueError for a file that can't be read or used."""
        image = None if picture.image is None else files.decode("image", picture.image)
        mask = None if picture.mask is None else _gray(files.decode("mask", picture.mask))
        if mask is not None and mask.size != image.size:
            sizes = f"{mask.width} x {mask.height} pixels, the image {image.width} x {image.height}"
            raise ValueError(f"the mask has {sizes}; give a mask of the image's size")
        if mask is not None and mask.getextrema()[1] < 128:
            raise ValueError("the mask has no white, and white is what is painted; use another, or invert it")
        return cls(image=image, mask=mask, map=None if picture.map is None else files.decode("map", picture.map))

    def image_of(self, size: ImageSize) -> Tensor:
        """The image at the size of the autoencoder's input, [1, 3, H, W] in [-1, 1]."""
        return _padded(_cut(self.image, size.height, size.width).image(self.image), *size.padded)[None]

    def mask_of(self, size: ImageSize) -> Tensor:
        """The mask at the size of the autoencoder's input, [1, H, W] of 0 and 1."""
        mask = _cut(self.mask, size.height, size.width).map(self.mask)
        return _padded((mask > 127).float(), *size.padded)

    def files(self, size: ImageSize, factor: int, noise_level: float) -> Files:
        """All files as hints read them. The source image is `factor` times smaller than the image that is made."""
        tall, wide = (math.ceil(side / factor) for side in size.padded)
        image = mask = map_of_it = None
        if self.image is not None:
            cut = _cut(self.image, math.ceil(size.height / factor), math.ceil(size.width / factor))
            image = _padded(cut.image(self.image), tall, wide)
            mask = None if self.mask is None else _padded((cut.map(self.mask) > 127).float(), tall, wide)
        if self.map is not None:
            map_of_it = _padded(_cut(self.map, size.height, size.width).map(self.map), *size.padded)
        return Files(image=image, mask=mask, map=map_of_it, noise_level=noise_level)

    def back_projected(self, made: Image.Image, size: ImageSize, factor: int, rounds: int) -> Image.Image:
        """Change an enlarged image so that it shrinks to its source; see `conditioning.hints.degradation`."""
        small = self.files(size, factor, 0.0).image[None]  # [1, 3, h, w]
        return tensor_to_image(back_projected(image_to_tensor(made)[None], small, rounds)[0])

    def completed(self, made: Image.Image, size: ImageSize, feather: int) -> Image.Image:
        """Take a decoded image where the mask is white, and the source image elsewhere.

        Within `feather` pixels around the mask, one fades into the other.
        """
        source = tensor_to_image(self.image_of(size)[0, :, : size.height, : size.width])
        mask = spread = self.mask_of(size)[:, : size.height, : size.width]
        for _ in range(feather):
            spread = F.max_pool2d(spread, 3, 1, 1)  # one pixel more on each side
            mask = mask + spread
        weights = (mask[0] * (255 / (feather + 1))).round().byte()  # [H, W]
        return Image.composite(made, source, Image.fromarray(weights.numpy()))


def condition_inputs(
    conditioner: Conditioner,
    batch: Sequence[Settings],
    sources: SourceImages,
    downsampling: int,
    has_prior: bool = False,
) -> ConditionInputs:
    """The inputs of a conditioner for B images that differ only in their prompts and seeds.

    Args:
        conditioner: of the model.
        batch: settings of the B images.
        sources: their decoded files.
        downsampling: of the autoencoder.
        has_prior: whether a prior samples the embedding of an image that is missing.

    Raises:
        ValueError: an image that the model requires is missing.
    """
    same, reads = batch[0], conditioner.reads
    size = ImageSize(height=same.height, width=same.width, downsampling=downsampling)
    hint = image = frame = None
    if "hint" in reads:
        files = sources.files(size, conditioner.hint.factor, same.noise_level)
        draws = (generator(picture.seed, "hint") for picture in batch)
        hint = torch.cat([conditioner.hint.of_files(files, *size.padded, draw) for draw in draws])  # [B, k, H, W]
    if "image" in reads:
        if sources.image is None and "image" in conditioner.required_to_sample and not has_prior:
            raise ValueError("this model is conditioned on an image; give an image, or a prior that makes embeddings")
        if sources.image is not None:
            image = sources.image_of(size).expand(len(batch), -1, -1, -1)  # [B, 3, H, W]
    if "frame" in reads:
        whole = [same.height, same.width, 0, 0, same.height, same.width]  # not cropped
        frame = torch.tensor([whole] * len(batch), dtype=torch.float32)  # [B, 6]
    return ConditionInputs(prompts=[picture.prompt for picture in batch], hint=hint, image=image, frame=frame)


def check_conditions(conditioner: Conditioner, picture: Settings) -> None:
    """Raise ValueError for settings that the model is not conditioned on."""
    reads = conditioner.hint.reads if "hint" in conditioner.reads else ()
    if picture.map is not None and "map" not in reads:
        raise ValueError(f"map {picture.map} is for models that are conditioned on a map; leave it out")
    if picture.back_projection and ("hint" not in conditioner.reads or conditioner.hint.factor == 1):
        raise ValueError(f"back projection {picture.back_projection} is for models that enlarge; leave it out")
    if picture.noise_level and "noise_level" not in reads:
        raise ValueError(f"noise level {picture.noise_level} is for models that enlarge; leave it out")


def _version(source: Source) -> tuple[str | int, ...]:
    """What changes when a source does: the hash of a PIL image, or the path, modification time and size of a file."""
    if isinstance(source, Image.Image):
        digest = hashlib.sha256(source.tobytes())  # takes a tenth of the time of `_decode`
        digest.update(repr((source.mode, source.size, source.info, source.getpalette(None))).encode())
        return (digest.hexdigest(),)
    path = os.path.abspath(source)
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_mtime_ns, status.st_size


def _decode(name: str, source: Source) -> Image.Image:
    """Decode a source. Raises ValueError if it can't be read or used."""
    file = str(source)
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        source.save(file, "PNG")
    try:
        return load_map(file) if name == "map" else load_image(file, BACKGROUNDS[name])
    except UnusableImage as error:
        of = "" if isinstance(source, Image.Image) else f" {source}"
        raise ValueError(f"{name}{of} can't be used: {error}; give another") from None


def _gray(mask: Image.Image) -> Image.Image:
    """The brightness of a mask. Raises ValueError if the file has colors, and so is not a mask."""
    colors = np.asarray(mask).astype(np.int16)  # [H, W, 3]
    if (np.ptp(colors, axis=2) > TINT).mean() > 0.01:
        raise ValueError("the mask has colors; a mask must be black and white; are image and mask swapped?")
    return mask.convert("L")


def _cut(picture: Image.Image, height: int, width: int) -> Crop:
    return Crop.covering(picture.size, (width, height))


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """Pad [k, h, w] to [k, height, width] by repeating the last row and column."""
    missing = (0, width - x.shape[2], 0, height - x.shape[1])
    return F.pad(x[None], missing, mode="replicate")[0] if any(missing) else x
