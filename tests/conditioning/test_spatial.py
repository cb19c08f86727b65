"""Claims about dense conditions: what readers make of hints, and what hints are made of."""

import dataclasses
import pickle
import warnings

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
from conditioning.hints.hint_files import Files
from conditioning.hints.hints import HINTS, SpatialConfig
from conditioning.hints.masks import CONVENTIONS, MASKS, MaskConfig, draw_mask
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.spatial import SpatialReader, level_embedding
from stipple_core.operators.sinusoids import sinusoids
from stipple_core.randomness import generator

SIDE = 32


def draws(index: int = 0) -> torch.Generator:
    return generator(3, "test", index)


def image(index: int = 0, side: int = SIDE) -> torch.Tensor:
    """A smooth picture [3, side, side]."""
    noise = torch.rand(1, 3, 5, 5, generator=draws(index)) * 2 - 1
    return F.interpolate(noise, size=(side, side), mode="bicubic")[0].clamp(-1, 1)


def classes(index: int = 0) -> torch.Tensor:
    return torch.randint(0, 5, (1, SIDE, SIDE), generator=draws(index)).float()


def reader(kind: str, **options) -> SpatialReader:
    torch.manual_seed(0)
    return SpatialReader(SpatialConfig(**{"kind": kind, "downsampling": 4, "classes": 5} | options))


def latents_of(images: torch.Tensor) -> torch.Tensor:
    """What stands for an autoencoder: [B, 3, H, W] -> [B, 4, H / 4, W / 4]."""
    means = F.avg_pool2d(images, 4)
    return torch.cat([means, means.mean(1, keepdim=True)], dim=1)


def told(one: SpatialReader, *hints: torch.Tensor, dropped=None):
    one.encode = latents_of
    return one(ConditionInputs(prompts=[""] * len(hints), hint=torch.stack(hints), dropped=dropped))


# -- readers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HINTS)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_what_a_reader_says_is_as_wide_as_it_says(kind, noise):
    one = reader(kind, noise=noise)
    hint = one.hint(image(), classes(), draws())
    context = told(one, hint, hint)
    assert hint.shape == (one.hint_channels, SIDE, SIDE)
    assert context.latents.shape == (2, one.widths.latents, 8, 8) and context.tokens is None
    assert (0 if context.vector is None else context.vector.shape[1]) == one.widths.vector
    assert one.trainable == bool(list(one.parameters())) == (kind == "semantic")


@pytest.mark.parametrize("kind", HINTS)
def test_a_hint_can_be_pickled_and_depends_on_its_generator_alone(kind):
    hint = reader(kind, noise=0.5).hint
    again = pickle.loads(pickle.dumps(hint))
    assert torch.equal(hint(image(), classes(), draws(1)), again(image(), classes(), draws(1)))
    random = kind in ("inpainting", "low_resolution")
    assert torch.equal(hint(image(), classes(), draws(1)), hint(image(), classes(), draws(2))) != random


@pytest.mark.parametrize("kind", HINTS)
def test_what_is_dropped_reads_zeros_only_where_the_config_says_so(kind):
    dropped = torch.tensor([False, True])
    for drop in (False, True):
        one = reader(kind, drop=drop)
        hint = one.hint(image(), classes(), draws())
        latents = told(one, hint, hint, dropped=dropped).latents
        assert torch.equal(latents[0], latents[1]) != drop and (latents[1].abs().sum() == 0) == drop


def test_a_semantic_map_is_the_mean_of_its_classes_columns():
    """Halving twice is the mean over 4 x 4 pixels; the convolution then adds up its columns."""
    one, numbers = reader("semantic"), classes()
    columns = one.aligned.channel_mapper.weight[:, :, 0, 0]  # [3, 5]
    expected = F.avg_pool2d(columns[:, numbers[0].long()], 4)
    assert torch.allclose(told(one, numbers).latents[0], expected, atol=1e-6)


def test_a_class_beyond_the_last_is_none():
    one = reader("semantic")
    assert told(one, torch.full((1, SIDE, SIDE), 5.0)).latents.abs().max() == 0
    assert told(one, torch.full((1, SIDE, SIDE), 255.0)).latents.abs().max() == 0


def test_a_users_map_without_a_class_is_refused_and_one_with_unknown_numbers_is_warned_of():
    hint, draw = reader("semantic").hint, draws(0)
    for value in (-1.0, 255.0, float("nan")):
        with pytest.raises(ValueError, match="the map has no class in it"):
            hint.of_files(Files(map=torch.full((1, SIDE, SIDE), value)), SIDE, SIDE, draw)
    with pytest.raises(ValueError, match="no class in it, its numbers are 7; give numbers from 0 to 4"):
        hint.of_files(Files(map=torch.full((1, SIDE, SIDE), 7.0)), SIDE, SIDE, draw)
    numbers = torch.zeros(1, SIDE, SIDE)
    numbers[0, 0, :3] = torch.tensor([9.0, 255.0, -1.0])
    with pytest.warns(UserWarning, match="numbers that are of no class: -1, 9; give numbers from 0 to 4"):
        hint.of_files(Files(map=numbers), SIDE, SIDE, draw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hint.of_files(Files(map=numbers.clamp(0, 4)), SIDE, SIDE, draw)
        reader("depth").hint.of_files(Files(map=torch.full((1, SIDE, SIDE), 900.0)), SIDE, SIDE, draw)


def test_inpainting_is_told_as_ldm_and_as_stable_diffusion_tell_it():
    picture, mask = image(), torch.zeros(1, SIDE, SIDE)
    mask[:, 8:24, 8:24] = 1
    for name, convention in CONVENTIONS.items():
        one = reader("inpainting", convention=name)
        hint = one.hint.of_files(Files(image=picture, mask=mask), SIDE, SIDE, draws())[0]
        latents = told(one, hint).latents[0]
        hole = {"ldm": -1.0, "stable_diffusion": 0.0}[name]
        without = torch.where(mask > 0, hole, picture)
        small = mask[:, ::4, ::4]
        parts = [latents_of(without[None])[0], small * 2 - 1 if name == "ldm" else small]
        assert torch.equal(latents, torch.cat(parts[::-1] if convention.mask_first else parts))


def test_nothing_of_what_is_hidden_reaches_the_network():
    one, mask = reader("inpainting"), draw_mask(SIDE, SIDE, MaskConfig(), draws())
    hints = [one.hint.of_files(Files(image=image(i), mask=mask), SIDE, SIDE, draws())[0] for i in (0, 1)]
    assert torch.equal(hints[0] * mask, hints[1] * mask) and not torch.equal(hints[0], hints[1])


def test_a_model_of_latents_is_told_the_small_picture_itself():
    one, small = reader("low_resolution"), image(side=8)
    hint = one.hint.of_files(Files(image=small), SIDE, SIDE, draws())[0]
    assert torch.allclose(told(one, hint).latents[0], small, atol=1e-6)
    in_training = one.hint(image(), None, draws())
    expected = degrade(image(), one.config.degradation, draws())
    assert torch.allclose(told(one, in_training).latents[0], expected, atol=1e-6)


def test_a_model_of_pixels_is_told_the_small_picture_by_bicubic_interpolation():
    one, small = reader("low_resolution", downsampling=1), image(side=8)
    hint = one.hint.of_files(Files(image=small), SIDE, SIDE, draws())
    assert torch.equal(told(one, hint[0]).latents, F.interpolate(small[None], size=(SIDE, SIDE), mode="bicubic"))


def test_noise_on_a_small_picture_keeps_its_variance_and_its_level_is_told():
    one = reader("low_resolution", noise=1.0)
    noise = torch.randn(3, 64, 64, generator=draws())  # a picture of unit variance
    for level in (0.0, 0.3, 1.0):
        hint = one.hint.of_files(Files(image=noise, noise_level=level), 256, 256, draws(7))
        assert hint[:, :3].std().item() == pytest.approx(1.0, abs=0.03)
        assert torch.equal(told(one, hint[0]).vector, level_embedding(torch.tensor([level])))
    levels = torch.stack([one.hint(image(), None, draws(i))[3, 0, 0] for i in range(200)])
    assert 0 <= levels.min() < 0.05 and 0.95 < levels.max() <= 1 and levels.mean() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(level_embedding(torch.tensor([0.3])), sinusoids(torch.tensor([1000 * 0.3]), 128))  # as a frame's
    vectors = level_embedding(torch.tensor([0.0, 0.05, 0.1, 0.5, 1.0]))
    assert torch.pdist(vectors).min() > 1


@pytest.mark.parametrize("kind", ["depth", "edges"])
def test_depths_and_edges_go_from_minus_one_to_one_whatever_their_scale(kind):
    one, map_ = reader(kind), image()[:1]
    latents = told(one, map_, 3000 * map_ + 70000, torch.full_like(map_, 7.0)).latents
    assert latents[0].min() == -1 and latents[0].max() == 1
    assert torch.allclose(latents[0], latents[1], atol=1e-3)
    assert latents[2].abs().max() == 0


def test_edges_are_where_the_brightness_changes():
    picture = torch.full((3, SIDE, SIDE), -0.5)
    picture[:, :, 10:] = 0.5
    found = reader("edges").hint(picture, None, draws())[0]
    assert (found[:, 9:11] > 1).all() and found[:, :9].abs().max() == 0 and found[:, 11:].abs().max() == 0


@pytest.mark.parametrize("kind", HINTS)
def test_files_of_other_sizes_are_brought_to_the_pictures(kind):
    one = reader(kind)
    files = Files(image=torch.rand(3, 50, 41), mask=torch.rand(1, 20, 77), map=torch.randint(0, 5, (1, 19, 90)).float())
    hint = one.hint.of_files(files, 64, 32, draws())
    assert hint.shape == (1, one.hint_channels, 64, 32) and hint.isfinite().all()
    if kind == "semantic":
        assert set(hint.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


WRONG = [
    (dict(kind="depths"), "spatial.kind 'depths' is unknown; use one of semantic"),
    (dict(kind="inpainting", convention="sd"), "spatial.convention 'sd' is unknown"),
    (dict(kind="semantic", downsampling=6), "6 is no power of 2"),
    (dict(kind="depth", downsampling=0), "spatial.downsampling 0 must be at least 1"),
    (dict(kind="low_resolution", noise=1.5), "spatial.noise 1.5 must be between 0"),
    (dict(kind="low_resolution", downsampling=8), "use a factor of 8 or more"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_a_config_that_makes_no_sense_is_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialConfig(**options)


def test_what_is_not_given_or_does_not_fit_is_one_line():
    for kind, message in (("semantic", "a semantic map"), ("inpainting", "a picture to be"), ("edges", "a map or an")):
        with pytest.raises(ValueError, match=message):
            reader(kind).hint.of_files(Files(), SIDE, SIDE, draws())
    with pytest.raises(ValueError, match="noise level 0.5 is more than this model was trained with; leave it out"):
        reader("low_resolution").hint.of_files(Files(image=image(), noise_level=0.5), SIDE, SIDE, draws())
    with pytest.raises(ValueError, match=r"a hint of shape \[4, 30, 32\] does not fit spatial.kind inpainting"):
        told(reader("inpainting"), torch.zeros(4, 30, 32))


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(32, 32), (24, 80), (8, 8)])
def test_masks_are_of_zeros_and_ones_and_hide_something(kind, size):
    config = MaskConfig(**{name: float(name == kind) for name in MASKS})
    masks = torch.stack([draw_mask(*size, config, draws(i)) for i in range(20)])
    assert masks.shape == (20, 1, *size) and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert masks.sum((1, 2, 3)).min() > 0
    assert (masks.mean() == 1) == (kind == "whole")
    assert torch.equal(masks[3], draw_mask(*size, config, draws(3)))


def test_masks_of_each_kind_come_as_often_as_the_config_says():
    config = MaskConfig(boxes=0.0, strokes=0.75, whole=0.25)
    whole = [bool(draw_mask(16, 16, config, draws(i)).all()) for i in range(200)]
    assert sum(whole) / 200 == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("options", [dict(boxes=-1.0), dict(box=(0.5, 0.2)), dict(brush=(0.0, 0.1)), dict(count=0)])
def test_masks_that_can_not_be_drawn_are_one_line(options):
    with pytest.raises(ValueError, match="masks"):
        MaskConfig(**options)


# -- degradation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_degraded_picture_is_small_and_depends_on_its_generator_alone(kind):
    config = DegradationConfig(kind=kind, factor=4)
    for size, small in (((64, 64), (16, 16)), ((30, 41), (8, 11))):
        picture = F.interpolate(image()[None], size=size, mode="bilinear")[0]
        first, again, other = (degrade(picture, config, draws(i)) for i in (1, 1, 2))
        assert first.shape == (3, *small) and first.abs().max() <= 1
        assert torch.equal(first, again) and torch.equal(first, other) == (kind == "bicubic")


@pytest.mark.parametrize("kind", ["bsrgan", "real_esrgan"])
def test_a_real_degradation_loses_more_than_bicubic_interpolation_and_keeps_the_colors(kind):
    picture = (image(side=64) + 0.3 * torch.randn(3, 64, 64, generator=draws(5))).clamp(-1, 1)
    clean = resized(picture, (16, 16), "bicubic")
    found = torch.stack([degrade(picture, DegradationConfig(kind=kind), draws(i)) for i in range(12)])
    assert (found - clean).square().mean((1, 2, 3)).min() > 1e-4
    assert (found.mean((0, 2, 3)) - clean.mean((1, 2))).abs().max() < 0.06


def test_a_kernel_sums_to_one_and_is_as_wide_and_as_turned_as_it_was_asked_for():
    kernel = gaussian_kernel(3.0, 1.0, 0.0)
    offsets = torch.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (kernel.sum(0) * offsets**2).sum().item() == pytest.approx(9.0, rel=0.05)
    assert (kernel.sum(1) * offsets**2).sum().item() == pytest.approx(1.0, rel=0.05)
    assert torch.allclose(gaussian_kernel(3.0, 1.0, torch.pi / 2), kernel.T, atol=1e-5)


def test_a_back_projected_picture_shrinks_to_the_small_one_and_keeps_what_is_finer():
    small, noise = image(side=16)[None], torch.randn(1, 3, 64, 64, generator=draws(4))
    wrong = F.interpolate(small, size=(64, 64), mode="bicubic") * 0.6 + 0.2
    fine = 0.1 * (noise - F.interpolate(resized(noise[0], (16, 16), "bicubic")[None], size=(64, 64), mode="bicubic"))
    mended = back_projected(wrong + fine, 0.8 * small, rounds=6)
    shrunk = resized(mended[0], (16, 16), "bicubic")
    assert (shrunk - 0.8 * small[0]).abs().mean() < 0.03 * (
        resized(wrong[0], (16, 16), "bicubic") - small[0]
    ).abs().mean()
    kept = F.cosine_similarity((mended - back_projected(wrong, 0.8 * small, rounds=6)).flatten(), fine.flatten(), dim=0)
    assert kept > 0.95


@pytest.mark.parametrize("options", [dict(kind="x"), dict(factor=0), dict(blur=(2.0, 1.0)), dict(quality=(0, 101))])
def test_a_degradation_that_is_none_is_one_line(options):
    with pytest.raises(ValueError, match="degradation"):
        DegradationConfig(**options)


def test_configs_come_back_from_plain_values():
    config = SpatialConfig(kind="inpainting", masks=MaskConfig(box=(0.1, 0.2)))
    values = dataclasses.asdict(config)
    assert MaskConfig(**values["masks"] | {"box": [0.1, 0.2]}) == config.masks
