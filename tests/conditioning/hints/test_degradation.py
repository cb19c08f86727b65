"""Tests of degradations and random masks, with which training makes hints."""

import pytest
import torch
import torch.nn.functional as F

from conditioning.hints.degradation import (
    DEGRADATIONS,
    DegradationConfig,
    back_projected,
    degrade,
    gaussian_kernel,
    resized,
)
from conditioning.hints.masks import MASKS, MaskConfig, draw_mask
from stipple_core.randomness import generator

SIDE = 32


def draws(index: int = 0) -> torch.Generator:
    return generator(3, "test", index)


def image(index: int = 0, side: int = SIDE) -> torch.Tensor:
    """Return a smooth image [3, side, side]."""
    noise = torch.rand(1, 3, 5, 5, generator=draws(index)) * 2 - 1
    return F.interpolate(noise, size=(side, side), mode="bicubic")[0].clamp(-1, 1)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(32, 32), (24, 80), (8, 8)])
def test_masks_are_zeros_and_ones_and_hide_at_least_one_pixel(kind, size):
    config = MaskConfig(**{name: float(name == kind) for name in MASKS})
    masks = torch.stack([draw_mask(*size, config, draws(i)) for i in range(20)])
    assert masks.shape == (20, 1, *size) and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert masks.sum((1, 2, 3)).min() > 0
    assert (masks.mean() == 1) == (kind == "whole")
    assert torch.equal(masks[3], draw_mask(*size, config, draws(3)))


def test_kinds_of_masks_have_the_configured_frequencies():
    config = MaskConfig(boxes=0.0, strokes=0.75, whole=0.25)
    whole = [bool(draw_mask(16, 16, config, draws(i)).all()) for i in range(200)]
    assert sum(whole) / 200 == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("options", [dict(boxes=-1.0), dict(box=(0.5, 0.2)), dict(brush=(0.0, 0.1)), dict(count=0)])
def test_invalid_options_of_masks_raise(options):
    with pytest.raises(ValueError, match="masks"):
        MaskConfig(**options)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_degraded_image_is_small_and_depends_only_on_its_generator(kind):
    config = DegradationConfig(kind=kind, factor=4)
    for size, small in (((64, 64), (16, 16)), ((30, 41), (8, 11))):
        original = F.interpolate(image()[None], size=size, mode="bilinear")[0]
        first, again, other = (degrade(original, config, draws(i)) for i in (1, 1, 2))
        assert first.shape == (3, *small) and first.abs().max() <= 1
        assert torch.equal(first, again) and torch.equal(first, other) == (kind == "bicubic")


@pytest.mark.parametrize("kind", ["bsrgan", "real_esrgan"])
def test_a_realistic_degradation_loses_more_than_bicubic_interpolation_and_keeps_the_colors(kind):
    original = (image(side=64) + 0.3 * torch.randn(3, 64, 64, generator=draws(5))).clamp(-1, 1)
    clean = resized(original, (16, 16), "bicubic")
    degraded = torch.stack([degrade(original, DegradationConfig(kind=kind), draws(i)) for i in range(12)])
    assert (degraded - clean).square().mean((1, 2, 3)).min() > 1e-4
    assert (degraded.mean((0, 2, 3)) - clean.mean((1, 2))).abs().max() < 0.06


def test_a_kernel_has_sum_1_and_the_requested_widths_and_angle():
    kernel = gaussian_kernel(3.0, 1.0, 0.0)
    offsets = torch.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (kernel.sum(0) * offsets**2).sum().item() == pytest.approx(9.0, rel=0.05)
    assert (kernel.sum(1) * offsets**2).sum().item() == pytest.approx(1.0, rel=0.05)
    assert torch.allclose(gaussian_kernel(3.0, 1.0, torch.pi / 2), kernel.T, atol=1e-5)


def test_back_projection_matches_the_small_image_and_keeps_finer_details():
    small, noise = image(side=16)[None], torch.randn(1, 3, 64, 64, generator=draws(4))
    wrong = F.interpolate(small, size=(64, 64), mode="bicubic") * 0.6 + 0.2
    fine = 0.1 * (noise - F.interpolate(resized(noise[0], (16, 16), "bicubic")[None], size=(64, 64), mode="bicubic"))
    corrected = back_projected(wrong + fine, 0.8 * small, rounds=6)
    shrunk = resized(corrected[0], (16, 16), "bicubic")
    assert (shrunk - 0.8 * small[0]).abs().mean() < 0.03 * (
        resized(wrong[0], (16, 16), "bicubic") - small[0]
    ).abs().mean()
    coarse = back_projected(wrong, 0.8 * small, rounds=6)
    similarity = F.cosine_similarity((corrected - coarse).flatten(), fine.flatten(), dim=0)
    assert similarity > 0.95


@pytest.mark.parametrize("options", [dict(kind="x"), dict(factor=0), dict(blur=(2.0, 1.0)), dict(quality=(0, 101))])
def test_invalid_options_of_a_degradation_raise(options):
    with pytest.raises(ValueError, match="degradation"):
        DegradationConfig(**options)
