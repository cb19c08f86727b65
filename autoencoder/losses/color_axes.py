"""Color axes: brightness, from blue to red, and from magenta to green.

In images the two axes of color vary much less than brightness, so an error over red, green and blue hardly shows
whether colors are right. A distance along these axes can weight each axis, and the explained variance measures each.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("brightness", "red_blue", "green_magenta")
AXES = torch.tensor(  # orthonormal, of red, green and blue
    [
        [3**-0.5, 3**-0.5, 3**-0.5],
        [2**-0.5, 0.0, -(2**-0.5)],
        [-(6**-0.5), 2 * 6**-0.5, -(6**-0.5)],
    ]
)


def along_axes(images: Tensor) -> Tensor:
    """Convert images [B, 3, H, W] from red, green and blue to brightness, red-blue and green-magenta [B, 3, H, W]."""
    return torch.einsum("ac,bchw->bahw", AXES.to(images), images)


class ExplainedVariance:
    """The fraction of each axis's variance, over the pixels of all images, that reconstructions explain.

    It is 1 - error / variance. `sums` (float64 [10]: for each axis the sum of values, of their squares, and of squared
    errors; last the number of pixels) can be summed over processes before reading the result.
    """

    def __init__(self):
        self.sums = torch.zeros(10, dtype=torch.float64)

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add a batch of images [B, 3, H, W] and their reconstructions."""
        values, errors = along_axes(images.double()), along_axes((reconstructions - images).double())
        parts = [part.sum(dim=(0, 2, 3)) for part in (values, values.square(), errors.square())]
        self.sums += torch.cat([*parts, values.new_tensor([values[:, 0].numel()])]).cpu()

    def fractions(self) -> dict[str, float]:
        """The explained fraction by the name of the axis, without axes on which all pixels are equal."""
        values, squares, errors = (self.sums[:-1] / self.sums[-1].clamp(min=1)).chunk(3)
        variances = squares - values.square()
        return {name: 1 - errors[i].item() / variances[i].item() for i, name in enumerate(NAMES) if variances[i] > 0}
