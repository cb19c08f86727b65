"""Cropping: the part of an image that is trained on, and the same part of its map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from stipple_core.images.images import image_to_tensor


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A rectangle of an image, the size that it is resized to, and whether it is mirrored."""

    whole: tuple[int, int]  # width and height of the image
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
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
        """The largest rectangle with the aspect ratio of the result; the longer side of the image is cropped.

        Args:
            whole: width and height of the image.
            size: of the result in pixels: the side of a square, or width and height.
            crop: where the longer side is cropped: "center", or "random", which is drawn from `generator`.
            flip: whether to mirror the result. The caller draws it.
            generator: for crop "random".
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
        """Crop an RGB image and resize it (bicubic, antialiased) to float32 [3, height, width] in [-1, 1]."""
        return image_to_tensor(self._cut(image, Image.Resampling.BICUBIC))

    def map(self, image: Image.Image) -> torch.Tensor:
        """Crop the same part of a map to float32 [1, height, width], without interpolating its values.

        Args:
            image: the map, of one channel (modes 1, L, P, I, I;16, F), such as class numbers or depths. Its resolution
                may differ from the image's.

        Raises:
            ValueError: the map has several channels.
        """
        if len(image.getbands()) != 1:
            raise ValueError(f"a map must have one channel, this one has {''.join(image.getbands())}; convert it")
        x, y = image.width / self.whole[0], image.height / self.whole[1]
        left, top, right, bottom = self.box
        scaled = Crop(whole=image.size, box=(left * x, top * y, right * x, bottom * y), size=self.size, flip=self.flip)
        values = np.asarray(scaled._cut(image, Image.Resampling.NEAREST)).astype(np.float32)
        return torch.from_numpy(values)[None]  # [1, height, width]

    @property
    def frame(self) -> tuple[float, ...]:
        """Size, crop and target size, on which SDXL is conditioned (Podell et al. 2023, section 2.2).

        Height and width of the image; top and left of the crop in pixels of the result; height and width of the result.
        For a mirrored image, left is counted in the mirrored image.
        """
        (width, height), (left, top, right, _) = self.whole, self.box
        scale = self.size[0] / (right - left)
        before = width - right if self.flip else left
        return (height, width, round(top * scale), round(before * scale), self.size[1], self.size[0])

    def _cut(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        left, top, right, bottom = self.box
        if (right - left, bottom - top) == self.size and all(float(side).is_integer() for side in self.box):
            image = image if self.size == image.size else image.crop(tuple(map(int, self.box)))
        else:  # cropping by the box of the resize gives equal pixels without a huge intermediate for a 1 x 50000 image
            image = image.resize(self.size, resampling, box=self.box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def fit(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: str = "center",
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Crop and resize an RGB image to float32 [3, height, width] in [-1, 1]; arguments as in `Crop.covering`."""
    return Crop.covering(image.size, size, crop, flip, generator).image(image)
