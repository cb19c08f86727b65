"""What a picture is made of besides prompts: files that are read, brought to its size, and handed to who reads them.

A picture is as large as it is asked to be, else as the image or map that it is made of, times the factor of a model
that enlarges. An image of another shape is scaled until it covers the picture, and cut in the middle. Sides that the
autoencoder's downsampling does not divide are made longer by repeating the last row and column; what is made there is
cut off at the end.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from conditioning.build import AnyConditioner
from conditioning.hints.degradation import back_projected
from conditioning.hints.hints import Files
from conditioning.interface.inputs import ConditionInputs
from ldm.sampling.settings import Settings, Source
from stipple_core.images.crop import Crop
from stipple_core.images.images import UnusableImage, image_to_tensor, load_image, load_map, tensor_to_image
from stipple_core.randomness import generator

BACKGROUNDS = {"image": (255, 255, 255), "mask": (0, 0, 0)}  # what is transparent is not painted
TINT = 48  # of 255, by which the channels of a gray pixel may differ: JPEG's


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a picture, in pixels, and of what the autoencoder is given for it."""

    height: int
    width: int
    downsampling: int  # of the autoencoder

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of what the autoencoder is given."""
        f = self.downsampling
        return math.ceil(self.height / f) * f, math.ceil(self.width / f) * f

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.padded[0] // self.downsampling, self.padded[1] // self.downsampling


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files of one picture, decoded; None: there is none of the kind."""

    image: Image.Image | None = None  # RGB
    mask: Image.Image | None = None  # gray, of the image's size
    map: Image.Image | None = None  # one channel of numbers

    @classmethod
    def of(cls, picture: Settings) -> Sources:
        """Read what a picture's settings name. Raises ValueError, in one line, for what can't be read or used."""
        image = None if picture.image is None else _read("image", picture.image)
        mask = None if picture.mask is None else _gray(_read("mask", picture.mask))
        if mask is not None and mask.size != image.size:
            sizes = f"{mask.width} x {mask.height} pixels, the image {image.width} x {image.height}"
            raise ValueError(f"the mask has {sizes}; give a mask of the image's size")
        if mask is not None and mask.getextrema()[1] < 128:
            raise ValueError("the mask has no white, and white is what is painted; give another, or invert it")
        return cls(image=image, mask=mask, map=None if picture.map is None else _read("map", picture.map))

    def image_of(self, size: Size) -> Tensor:
        """The image at the size that the autoencoder is given, [1, 3, H, W] in [-1, 1]."""
        return _padded(_cut(self.image, size.height, size.width).image(self.image), *size.padded)[None]

    def mask_of(self, size: Size) -> Tensor:
        """The mask likewise, [1, H, W] of 0 and 1."""
        mask = _cut(self.mask, size.height, size.width).map(self.mask)
        return _padded((mask > 127).float(), *size.padded)

    def files(self, size: Size, factor: int, noise_level: float) -> Files:
        """All as hints are made of them; the image is `factor` times smaller than the picture."""
        tall, wide = (math.ceil(side / factor) for side in size.padded)
        image = mask = map_of_it = None
        if self.image is not None:
            cut = _cut(self.image, math.ceil(size.height / factor), math.ceil(size.width / factor))
            image = _padded(cut.image(self.image), tall, wide)
            mask = None if self.mask is None else _padded((cut.map(self.mask) > 127).float(), tall, wide)
        if self.map is not None:
            map_of_it = _padded(_cut(self.map, size.height, size.width).map(self.map), *size.padded)
        return Files(image=image, mask=mask, map=map_of_it, noise_level=noise_level)

    def agreed(self, made: Image.Image, size: Size, factor: int, rounds: int) -> Image.Image:
        """A picture of the size that was decoded, changed so that it shrinks to the image, see `back_projected`."""
        small = self.files(size, factor, 0.0).image[None]  # [1, 3, h, w]
        return tensor_to_image(back_projected(image_to_tensor(made)[None], small, rounds)[0])

    def completed(self, made: Image.Image, size: Size, feather: int) -> Image.Image:
        """A made picture where the mask is white, the image's own pixels elsewhere.

        In as many pixels around the mask as `feather` says, the one fades into the other.
        """
        own = tensor_to_image(self.image_of(size)[0, :, : size.height, : size.width])
        mask = spread = self.mask_of(size)[:, : size.height, : size.width]
        for _ in range(feather):
            spread = F.max_pool2d(spread, 3, 1, 1)  # one pixel more on each side
            mask = mask + spread
        weights = (mask[0] * (255 / (feather + 1))).round().byte()  # [H, W]
        return Image.composite(made, own, Image.fromarray(weights.numpy()))


def give(
    conditioner: AnyConditioner, batch: Sequence[Settings], sources: Sources, downsampling: int, prior: bool = False
) -> ConditionInputs:
    """What a conditioner reads of B pictures that differ in nothing but prompts and seed.

    Where there is a prior, it says the embedding of an image that is not given.

    Raises:
        ValueError: something is given that the model does not read, or not given that it needs.
    """
    same, reads = batch[0], conditioner.reads
    size = Size(height=same.height, width=same.width, downsampling=downsampling)
    hint = image = frame = None
    if "hint" in reads:
        files = sources.files(size, conditioner.hint.factor, same.noise_level)
        draws = (generator(picture.seed, "hint") for picture in batch)
        hint = torch.cat([conditioner.hint.of_files(files, *size.padded, draw) for draw in draws])  # [B, k, H, W]
    if "image" in reads:
        if sources.image is None and "image" in conditioner.required_to_sample and not prior:
            raise ValueError("this model imitates a picture, and none is given; give an image, or a prior")
        if sources.image is not None:
            image = sources.image_of(size).expand(len(batch), -1, -1, -1)  # [B, 3, H, W]
    if "frame" in reads:
        whole = [same.height, same.width, 0, 0, same.height, same.width]  # nothing was cut off
        frame = torch.tensor([whole] * len(batch), dtype=torch.float32)  # [B, 6]
    return ConditionInputs(prompts=[picture.prompt for picture in batch], hint=hint, image=image, frame=frame)


def check_read(conditioner: AnyConditioner, picture: Settings) -> None:
    """Raise ValueError for what is given to a model that does not read it."""
    reads = conditioner.hint.reads if "hint" in conditioner.reads else ()
    if picture.map is not None and "map" not in reads:
        raise ValueError(f"map {picture.map} is given, and this model reads none; leave it out")
    if picture.back_projection and ("hint" not in conditioner.reads or conditioner.hint.factor == 1):
        raise ValueError(f"back projection {picture.back_projection} is for models that enlarge; leave it out")
    if picture.noise_level and "noise_level" not in reads:
        raise ValueError(f"noise level {picture.noise_level} is for models that enlarge; leave it out")


def _read(name: str, source: Source) -> Image.Image:
    """An upright RGB image, a mask over black where it is transparent, or a map as it is."""
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
    """A mask's brightness. Raises ValueError where it has colors, and so is some other picture."""
    colors = np.asarray(mask).astype(np.int16)  # [H, W, 3]
    if (np.ptp(colors, axis=2) > TINT).mean() > 0.01:
        raise ValueError("the mask has colors, and a mask is black and white; are image and mask swapped?")
    return mask.convert("L")


def _cut(picture: Image.Image, height: int, width: int) -> Crop:
    return Crop.covering(picture.size, (width, height))


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """[k, h, w] -> [k, height, width], the last row and column repeated."""
    missing = (0, width - x.shape[2], 0, height - x.shape[1])
    return F.pad(x[None], missing, mode="replicate")[0] if any(missing) else x
