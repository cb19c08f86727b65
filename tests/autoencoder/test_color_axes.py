"""Color axes: their definition, the loss along them, and the explained variance."""

from __future__ import annotations

import pytest
import torch

from autoencoder.losses.color_axes import AXES, ExplainedVariance, along_axes
from autoencoder.losses.generator_loss import LossConfig, pixel_error


def colored(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32)[None, :, None, None].expand(1, 3, 4, 4)


def test_the_axes_are_orthonormal_and_gray_is_only_on_the_first():
    assert torch.allclose(AXES @ AXES.T, torch.eye(3), atol=1e-6)
    gray = along_axes(colored(0.5, 0.5, 0.5))[0, :, 0, 0]
    assert gray[0] == pytest.approx(0.5 * 3**0.5) and gray[1:].abs().max() < 1e-6
    assert along_axes(colored(1, 0, 0))[0, 1, 0, 0] > 0 > along_axes(colored(0, 0, 1))[0, 1, 0, 0]
    assert along_axes(colored(0, 1, 0))[0, 2, 0, 0] > 0 > along_axes(colored(1, 0, 1))[0, 2, 0, 0]


def test_an_error_on_an_axis_is_weighted_by_the_weight_of_the_axis():
    images = torch.rand(2, 3, 8, 8)
    for axis, weight in enumerate((1.0, 1.5, 3.0)):
        wrong = images + 0.1 * AXES[axis][:, None, None]
        assert pixel_error(images, wrong, [1.0, 1.5, 3.0]).item() == pytest.approx(0.1 * weight / 3, rel=1e-4)
    assert pixel_error(images, images + 0.1).item() == pytest.approx(0.1, rel=1e-4)


def test_explained_variance_is_one_for_a_copy_and_zero_for_the_mean_and_does_not_depend_on_batches():
    images = torch.rand(6, 3, 8, 8)
    copy, mean, parts = ExplainedVariance(), ExplainedVariance(), ExplainedVariance()
    copy.update(images, images)
    average = images.mean(dim=(0, 2, 3), keepdim=True).expand_as(images)
    mean.update(images, average)
    for first in range(0, 6, 2):
        parts.update(images[first : first + 2], average[first : first + 2])
    assert list(copy.fractions().values()) == pytest.approx([1, 1, 1])
    assert list(mean.fractions().values()) == pytest.approx([0, 0, 0], abs=1e-5)
    assert parts.fractions() == pytest.approx(mean.fractions())


def test_a_gray_reconstruction_only_explains_brightness():
    images, measured = torch.rand(6, 3, 8, 8), ExplainedVariance()
    measured.update(images, images.mean(dim=1, keepdim=True).expand_as(images))
    fractions = measured.fractions()
    assert fractions["brightness"] > 0.999 and max(fractions["red_blue"], fractions["green_magenta"]) < 0.05
    flat = ExplainedVariance()
    flat.update(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2))
    assert not flat.fractions()


def test_other_than_three_weights_are_refused():
    with pytest.raises(ValueError, match="three weights, of brightness, red_blue, green_magenta, or none"):
        LossConfig(colors=[1.0, 2.0])
