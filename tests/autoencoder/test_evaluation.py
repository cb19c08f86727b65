"""PSNR and SSIM against closed forms, and SSIM against a computation window by window in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from autoencoder.losses.similarity import psnr, ssim


def random_images(seed: int, count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def ssim_by_windows(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, one window at a time; x, y [C, H, W] in [0, 1]."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for plane_x, plane_y in zip(x, y, strict=True):
        for top in range(plane_x.shape[0] - 10):
            for left in range(plane_x.shape[1] - 10):
                a, b = plane_x[top : top + 11, left : left + 11], plane_y[top : top + 11, left : left + 11]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
                values.append(luminance * (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2))
    return float(np.mean(values))


@pytest.mark.parametrize("error", [1.0, 0.1, 1e-3])
def test_psnr_of_a_constant_error_is_the_ratio_of_peak_and_error(error):
    images = torch.full((2, 3, 8, 8), -0.5)
    assert psnr(images, images + error).tolist() == pytest.approx([20 * math.log10(2 / error)] * 2, abs=1e-3)


def test_psnr_of_8_bit_images_has_peak_255():
    draws = np.random.default_rng(0)
    a, b = draws.integers(0, 256, (2, 1, 3, 12, 12)).astype(np.float64)
    expected = 10 * math.log10(255**2 / ((a - b) ** 2).mean())
    scaled = [torch.from_numpy(x / 127.5 - 1).float() for x in (a, b)]
    assert psnr(*scaled).item() == pytest.approx(expected, abs=1e-4)


def test_psnr_is_measured_for_each_image_and_finite_for_equal_ones():
    images = random_images(0, 3)
    other = images.clone()
    other[1] = -other[1]
    measured = psnr(images, other)
    assert measured.shape == (3,) and measured[0] == measured[2] > 100 and measured[1] < 20


def test_ssim_equals_wang_et_al_window_by_window():
    x, y = random_images(1), random_images(2)
    y = (0.7 * x + 0.3 * y).clamp(-1, 1)
    expected = [ssim_by_windows(*((z.double().numpy() + 1) / 2 for z in pair)) for pair in zip(x, y, strict=True)]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=2e-5)


def test_ssim_is_symmetric_1_for_equal_images_and_negative_for_inverted_ones():
    x, y = random_images(3), random_images(4)
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert (ssim(x, -x) < 0).all()
    assert torch.allclose(ssim(x, y), ssim(y, x), atol=1e-6)


def test_ssim_of_two_constant_images_is_their_luminance_term():
    x, y = torch.full((1, 3, 11, 11), -0.5), torch.full((1, 3, 11, 11), 0.5)  # 0.25 and 0.75 in [0, 1]
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(x, y).item() == pytest.approx(expected, abs=5e-4)  # float32: the variances are differences of squares


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_reconstructions_are_clamped(measure):
    images, reconstructions = random_images(5), 1.5 * random_images(6)
    assert torch.equal(measure(images, reconstructions), measure(images, reconstructions.clamp(-1, 1)))


def test_images_smaller_than_the_window_are_an_error():
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, got \(10, 32\)"):
        ssim(torch.zeros(1, 3, 10, 32), torch.zeros(1, 3, 10, 32))
