"""The part of a picture that is trained on: where it lies, and how it and a map of the same place are cut out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from stipple_core.images.images import image_to_tensor


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A rectangle of a picture, and what becomes of it."""

    whole: tuple[int, int]  # width and height of the picture
    box: tuple[float, float, float, float]  # left, top, right, bottom in its pixels
    size: tuple[int, int]  # width and height of the result
    flip: bool = False  # mirror left to right

    @classmethod
    def covering(
        cls,
        whole: tuple[int, int],
        size: int | tuple[int, int],
        crop: str = "center",
        flip: bool = False,
        generator: torch.Generator | None = None,
    ) -> Crop:
        """The largest rectangle of the result's shape; what stands over on one side is left out.

        Args:
            whole: width and height of the picture.
            size: of the result, in pixels: the side of a square, or width and height.
            crop: "center", or "random" along the side that stands over, drawn from `generator`.
            flip: mirror it; this is the decision, not a permission: who calls has drawn it.
        """
        to_width, to_height = (size, size) if isinstance(size, int) else size
        width, height = whole
        if (width, height) == (to_width, to_height):
            return cls(whole=whole, box=(0, 0, width, height), size=whole, flip=flip)
        place = 0.5 if crop == "center" else float(torch.rand((), generator=generator))
        inner_width = min(width, height * to_width / to_height)
        inner_height = min(height, width * to_height / to_width)
        left, top = (width - inner_width) * place, (height - inner_height) * place
        if (inner_width, inner_height) == (to_width, to_height):
            box = (round(left), round(top), round(left) + to_width, round(top) + to_height)
        else:
            box = (left, top, left + inner_width, top + inner_height)
        return cls(whole=whole, box=box, size=(to_width, to_height), flip=flip)

    def image(self, image: Image.Image) -> torch.Tensor:
        """The part of an RGB picture as float32 [3, height, width] in [-1, 1], resized with antialiasing (bicubic)."""
        return image_to_tensor(self._cut(image, Image.Resampling.BICUBIC))

    def map(self, picture: Image.Image) -> torch.Tensor:
        """The same part of a map, which may have another resolution, as float32 [1, height, width] of its own values.

        Args:
            picture: of one channel (modes 1, L, P, I, I;16, F): class numbers or depths; nothing is interpolated.

        Raises:
            ValueError: it has several channels.
        """
        if len(picture.getbands()) != 1:
            raise ValueError(f"a map must have one channel, this has {''.join(picture.getbands())}; convert it")
        x, y = picture.width / self.whole[0], picture.height / self.whole[1]
        left, top, right, bottom = self.box
        scaled = Crop(
            whole=picture.size, box=(left * x, top * y, right * x, bottom * y), size=self.size, flip=self.flip
        )
        values = np.asarray(scaled._cut(picture, Image.Resampling.NEAREST)).astype(np.float32)
        return torch.from_numpy(values)[None]  # [1, height, width]

    @property
    def frame(self) -> tuple[float, ...]:
        """Height and width of the whole, top and left of the part in pixels of the result, its height and width.

        So SDXL is told of size and crop (Podell et al. 2023, section 2.2). Of a mirrored picture left is as it is seen.
        """
        (width, height), (left, top, right, _) = self.whole, self.box
        scale = self.size[0] / (right - left)
        before = width - right if self.flip else left
        return (height, width, round(top * scale), round(before * scale), self.size[1], self.size[0])

    def _cut(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        left, top, right, bottom = self.box
        if (right - left, bottom - top) == self.size and all(float(side).is_integer() for side in self.box):
            image = image if self.size == image.size else image.crop(tuple(map(int, self.box)))
        else:  # the crop as the resize's source box: the same pixels, and a 1 x 50000 strip needs no huge intermediate
            image = image.resize(self.size, resampling, box=self.box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def fit(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: str = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """An RGB picture's cutout as float32 [3, height, width] in [-1, 1]; the arguments are those of `covering`."""
    return Crop.covering(image.size, size, crop, flip, generator).image(image)
