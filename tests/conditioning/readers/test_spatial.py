"""Tests of spatial conditioning: the hints, and the latents that readers make of them."""

import dataclasses
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from conditioning.hints.degradation import degrade
from conditioning.hints.hint_files import Files
from conditioning.hints.hints import HINTS, SpatialConfig
from conditioning.hints.masks import CONVENTIONS, MaskConfig, draw_mask
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.spatial import SpatialReader, level_embedding
from stipple_core.operators.sinusoids import sinusoids
from stipple_core.randomness import generator

SIDE = 32


def draws(index: int = 0) -> torch.Generator:
    return generator(3, "test", index)


def image(index: int = 0, side: int = SIDE) -> torch.Tensor:
    """Return a smooth image [3, side, side]."""
    noise = torch.rand(1, 3, 5, 5, generator=draws(index)) * 2 - 1
    return F.interpolate(noise, size=(side, side), mode="bicubic")[0].clamp(-1, 1)


def classes(index: int = 0) -> torch.Tensor:
    return torch.randint(0, 5, (1, SIDE, SIDE), generator=draws(index)).float()


def reader(kind: str, **options) -> SpatialReader:
    torch.manual_seed(0)
    return SpatialReader(SpatialConfig(**{"kind": kind, "downsampling": 4, "classes": 5} | options))


def latents_of(images: torch.Tensor) -> torch.Tensor:
    """Replace an autoencoder: [B, 3, H, W] -> [B, 4, H / 4, W / 4]."""
    means = F.avg_pool2d(images, 4)
    return torch.cat([means, means.mean(1, keepdim=True)], dim=1)


def context_of(one: SpatialReader, *hints: torch.Tensor, dropped=None):
    one.bind_encoder(latents_of)
    return one(ConditionInputs(prompts=[""] * len(hints), hint=torch.stack(hints), dropped=dropped))


@pytest.mark.parametrize("kind", HINTS)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_context_has_the_widths_of_its_reader(kind, noise):
    one = reader(kind, noise=noise)
    hint = one.hint(image(), classes(), draws())
    context = context_of(one, hint, hint)
    assert hint.shape == (one.hint_channels, SIDE, SIDE)
    assert context.latents.shape == (2, one.widths.latents, 8, 8) and context.tokens is None
    assert (0 if context.vector is None else context.vector.shape[1]) == one.widths.vector
    assert one.trainable == bool(list(one.parameters())) == (kind == "semantic")


@pytest.mark.parametrize("kind", HINTS)
def test_a_hint_can_be_pickled_and_depends_only_on_its_generator(kind):
    hint = reader(kind, noise=0.5).hint
    again = pickle.loads(pickle.dumps(hint))
    assert torch.equal(hint(image(), classes(), draws(1)), again(image(), classes(), draws(1)))
    random = kind in ("inpainting", "low_resolution")
    assert torch.equal(hint(image(), classes(), draws(1)), hint(image(), classes(), draws(2))) != random


@pytest.mark.parametrize("kind", HINTS)
def test_latents_of_dropped_members_are_zero_only_with_config_drop(kind):
    dropped = torch.tensor([False, True])
    for drop in (False, True):
        one = reader(kind, drop=drop)
        hint = one.hint(image(), classes(), draws())
        latents = context_of(one, hint, hint, dropped=dropped).latents
        assert torch.equal(latents[0], latents[1]) != drop and (latents[1].abs().sum() == 0) == drop


def test_latents_of_a_semantic_map_are_area_means_of_its_classes_weights():
    """Halving twice is the mean over 4 x 4 pixels, and the convolution is linear."""
    one, numbers = reader("semantic"), classes()
    columns = one.aligned.channel_mapper.weight[:, :, 0, 0]  # [3, 5]
    expected = F.avg_pool2d(columns[:, numbers[0].long()], 4)
    assert torch.allclose(context_of(one, numbers).latents[0], expected, atol=1e-6)


def test_numbers_beyond_the_last_class_have_zero_latents():
    one = reader("semantic")
    assert context_of(one, torch.full((1, SIDE, SIDE), 5.0)).latents.abs().max() == 0
    assert context_of(one, torch.full((1, SIDE, SIDE), 255.0)).latents.abs().max() == 0


def test_a_map_without_any_class_raises_and_one_with_other_numbers_warns():
    hint, draw = reader("semantic").hint, draws(0)
    for value in (-1.0, 255.0, float("nan")):
        with pytest.raises(ValueError, match="the map has no class in it"):
            hint.of_files(Files(map=torch.full((1, SIDE, SIDE), value)), SIDE, SIDE, draw)
    with pytest.raises(ValueError, match="no class in it, its numbers are 7; use numbers from 0 to 4"):
        hint.of_files(Files(map=torch.full((1, SIDE, SIDE), 7.0)), SIDE, SIDE, draw)
    numbers = torch.zeros(1, SIDE, SIDE)
    numbers[0, 0, :3] = torch.tensor([9.0, 255.0, -1.0])
    with pytest.warns(UserWarning, match="numbers that are not classes: -1, 9; use numbers from 0 to 4"):
        hint.of_files(Files(map=numbers), SIDE, SIDE, draw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hint.of_files(Files(map=numbers.clamp(0, 4)), SIDE, SIDE, draw)
        reader("depth").hint.of_files(Files(map=torch.full((1, SIDE, SIDE), 900.0)), SIDE, SIDE, draw)


def test_masked_images_are_encoded_as_in_ldm_and_in_stable_diffusion():
    original, mask = image(), torch.zeros(1, SIDE, SIDE)
    mask[:, 8:24, 8:24] = 1
    for name, convention in CONVENTIONS.items():
        one = reader("inpainting", convention=name)
        hint = one.hint.of_files(Files(image=original, mask=mask), SIDE, SIDE, draws())[0]
        latents = context_of(one, hint).latents[0]
        hole = {"ldm": -1.0, "stable_diffusion": 0.0}[name]
        masked = torch.where(mask > 0, hole, original)
        small = mask[:, ::4, ::4]
        parts = [latents_of(masked[None])[0], small * 2 - 1 if name == "ldm" else small]
        assert torch.equal(latents, torch.cat(parts[::-1] if convention.mask_first else parts))


def test_masked_pixels_do_not_reach_the_network():
    one, mask = reader("inpainting"), draw_mask(SIDE, SIDE, MaskConfig(), draws())
    hints = [one.hint.of_files(Files(image=image(i), mask=mask), SIDE, SIDE, draws())[0] for i in (0, 1)]
    assert torch.equal(hints[0] * mask, hints[1] * mask) and not torch.equal(hints[0], hints[1])


def test_a_model_of_latents_reads_the_small_image_itself():
    one, small = reader("low_resolution"), image(side=8)
    hint = one.hint.of_files(Files(image=small), SIDE, SIDE, draws())[0]
    assert torch.allclose(context_of(one, hint).latents[0], small, atol=1e-6)
    in_training = one.hint(image(), None, draws())
    expected = degrade(image(), one.config.degradation, draws())
    assert torch.allclose(context_of(one, in_training).latents[0], expected, atol=1e-6)


def test_a_model_of_pixels_reads_the_small_image_after_bicubic_interpolation():
    one, small = reader("low_resolution", downsampling=1), image(side=8)
    hint = one.hint.of_files(Files(image=small), SIDE, SIDE, draws())
    assert torch.equal(context_of(one, hint[0]).latents, F.interpolate(small[None], size=(SIDE, SIDE), mode="bicubic"))


def test_noise_keeps_the_variance_of_a_small_image_and_its_level_is_embedded():
    one = reader("low_resolution", noise=1.0)
    noise = torch.randn(3, 64, 64, generator=draws())  # an image of unit variance
    for level in (0.0, 0.3, 1.0):
        hint = one.hint.of_files(Files(image=noise, noise_level=level), 256, 256, draws(7))
        assert hint[:, :3].std().item() == pytest.approx(1.0, abs=0.03)
        assert torch.equal(context_of(one, hint[0]).vector, level_embedding(torch.tensor([level])))
    levels = torch.stack([one.hint(image(), None, draws(i))[3, 0, 0] for i in range(200)])
    assert 0 <= levels.min() < 0.05 and 0.95 < levels.max() <= 1 and levels.mean() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(level_embedding(torch.tensor([0.3])), sinusoids(torch.tensor([1000 * 0.3]), 128))  # as timesteps
    vectors = level_embedding(torch.tensor([0.0, 0.05, 0.1, 0.5, 1.0]))
    assert torch.pdist(vectors).min() > 1


@pytest.mark.parametrize("kind", ["depth", "edges"])
def test_depths_and_edges_on_any_scale_are_mapped_to_minus_one_to_one(kind):
    one, map_ = reader(kind), image()[:1]
    latents = context_of(one, map_, 3000 * map_ + 70000, torch.full_like(map_, 7.0)).latents
    assert latents[0].min() == -1 and latents[0].max() == 1
    assert torch.allclose(latents[0], latents[1], atol=1e-3)
    assert latents[2].abs().max() == 0


def test_edges_are_where_the_brightness_changes():
    step = torch.full((3, SIDE, SIDE), -0.5)
    step[:, :, 10:] = 0.5
    edges = reader("edges").hint(step, None, draws())[0]
    assert (edges[:, 9:11] > 1).all() and edges[:, :9].abs().max() == 0 and edges[:, 11:].abs().max() == 0


@pytest.mark.parametrize("kind", HINTS)
def test_files_of_other_sizes_are_scaled_to_that_of_the_picture(kind):
    one = reader(kind)
    files = Files(image=torch.rand(3, 50, 41), mask=torch.rand(1, 20, 77), map=torch.randint(0, 5, (1, 19, 90)).float())
    hint = one.hint.of_files(files, 64, 32, draws())
    assert hint.shape == (1, one.hint_channels, 64, 32) and hint.isfinite().all()
    if kind == "semantic":
        assert set(hint.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


WRONG = [
    (dict(kind="depths"), "spatial.kind 'depths' is unknown; use one of semantic"),
    (dict(kind="inpainting", convention="sd"), "spatial.convention 'sd' is unknown"),
    (dict(kind="semantic", downsampling=6), "6 must be a power of 2"),
    (dict(kind="depth", downsampling=0), "spatial.downsampling 0 must be at least 1"),
    (dict(kind="low_resolution", noise=1.5), "spatial.noise 1.5 must be between 0"),
    (dict(kind="low_resolution", downsampling=8), "use a factor of 8 or more"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_an_invalid_config_raises_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialConfig(**options)


def test_missing_or_unfit_files_raise():
    for kind, message in (
        ("semantic", "a semantic map"),
        ("inpainting", "an image to inpaint"),
        ("edges", "a map or an"),
    ):
        with pytest.raises(ValueError, match=message):
            reader(kind).hint.of_files(Files(), SIDE, SIDE, draws())
    with pytest.raises(ValueError, match="noise level 0.5 exceeds that of this model's training; leave it out"):
        reader("low_resolution").hint.of_files(Files(image=image(), noise_level=0.5), SIDE, SIDE, draws())
    with pytest.raises(ValueError, match=r"a hint of shape \[4, 30, 32\] does not fit spatial.kind inpainting"):
        context_of(reader("inpainting"), torch.zeros(4, 30, 32))


def test_a_config_equals_one_made_of_its_plain_values():
    config = SpatialConfig(kind="inpainting", masks=MaskConfig(box=(0.1, 0.2)))
    values = dataclasses.asdict(config)
    assert MaskConfig(**values["masks"] | {"box": [0.1, 0.2]}) == config.masks
