"""Colors along three axes: brightness, from blue to red, and from magenta to green.

The last two vary much less in pictures than the first, so an error in red, green and blue hardly shows whether they are
right; a distance along the axes can weigh each, and the share of each axis's variance that is explained shows it.
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
    """Images [B, 3, H, W] in red, green and blue -> brightness, red-blue and green-magenta [B, 3, H, W]."""
    return torch.einsum("ac,bchw->bahw", AXES.to(images), images)


class ExplainedVariance:
    """The share of each axis's variance, over pixels of all images, that reconstructions explain: 1 - error / variance.

    `sums` (float64, [3, 3]: of values, their squares and squared errors, for each axis; [1]: pixels) may be added up
    over processes before it is read.
    """

    def __init__(self):
        self.sums = torch.zeros(10, dtype=torch.float64)

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Take in images [B, 3, H, W] and what was made of them."""
        values, errors = along_axes(images.double()), along_axes((reconstructions - images).double())
        parts = [part.sum(dim=(0, 2, 3)) for part in (values, values.square(), errors.square())]
        self.sums += torch.cat([*parts, values.new_tensor([values[:, 0].numel()])]).cpu()

    def shares(self) -> dict[str, float]:
        """By the axis's name; of an axis on which nothing varies there is none."""
        values, squares, errors = (self.sums[:-1] / self.sums[-1].clamp(min=1)).chunk(3)
        variances = squares - values.square()
        return {name: 1 - errors[i].item() / variances[i].item() for i, name in enumerate(NAMES) if variances[i] > 0}
