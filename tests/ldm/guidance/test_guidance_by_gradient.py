"""Guidance by gradients: exact classifiers equal conditioning; gradients in inference mode."""

import math

import pytest
import torch

from conditioning.interface.context import Context
from ldm.denoising.denoiser import Denoiser
from ldm.guidance.classifier_free import classifier_free, extrapolate
from ldm.guidance.gradient import by_estimate, by_gradient
from ldm.networks.cached_unet import CachedUNet
from ldm.samplers.onestep import ddim
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from tests.helpers.models.small_unets import SMALL, context, random_unet
from tests.helpers.proofs.oracles import GAUSSIAN, SCHEDULES, TWO, Mixture, denoiser_of

NOISED = [0.001, 0.05, 0.3, 0.6, 0.9, 0.999, 1.0]


def classes(schedule):
    """log p(second component | z_t, t) of TWO, exactly, for each image the sum over its elements."""

    def score(z_t, t):
        alpha, sigma = (level.item() for level in schedule(t))
        return TWO._noised(z_t, alpha, sigma)[0].log_softmax(-1)[..., 1].flatten(1).sum(1)

    return score


def some(schedule, t):
    return torch.linspace(-3, 3, 42, dtype=torch.float64).view(2, 21) * math.hypot(*schedule(t))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.0, 3.0, 10.0])
def test_guidance_by_the_exact_classifier_equals_conditioning_on_the_class(name, scale):
    """Dhariwal & Nichol 2021 and Ho & Salimans 2022 are one where p(y | z_t, t) is Bayes' rule."""
    schedule = SCHEDULES[name]
    untold, condition = denoiser_of(TWO, schedule), denoiser_of(Mixture((1.0,), TWO.means[1:], TWO.stds[1:]), schedule)
    guided = by_gradient(untold, classes(schedule), scale, schedule)
    for t in NOISED:
        if schedule(t)[0] > 0:
            z_t = some(schedule, t)
            expected = extrapolate(condition(z_t, t), untold(z_t, t), scale)
            torch.testing.assert_close(guided(z_t, t), expected, rtol=1e-10, atol=1e-10)


def test_each_image_has_its_own_gradient_and_time():
    schedule = SCHEDULES["scaled_linear"]
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    z_t = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([1.0, -2.0], dtype=torch.float64).view(2, 1, 1, 1)
    guided = by_gradient(lambda z, t: z, lambda z, t: -(z - target).square().flatten(1).sum(1) / 2, 2.0, schedule)
    alpha, sigma = (level.view(2, 1, 1, 1) for level in schedule(t))
    torch.testing.assert_close(guided(z_t, t), z_t + 2 * sigma**2 / alpha * (target - z_t))


@pytest.mark.parametrize("name", ["scaled_linear", "ve", "flow"])
def test_through_the_denoiser_a_gradient_is_multiplied_by_the_covariance_of_what_is_not_known(name):
    """sigma^2 / alpha dE[z_0 | z_t] / dz_t = Cov[z_0 | z_t], which for a Gaussian is a number of t."""
    schedule, std, slope = SCHEDULES[name], GAUSSIAN.stds[0], 1.7
    guided = by_estimate(denoiser_of(GAUSSIAN, schedule), lambda z_0, t: slope * z_0.sum(1), 2.0, schedule)
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = (level.item() for level in schedule(t))
        covariance = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
        expected = GAUSSIAN.denoise(some(schedule, t), alpha, sigma) + 2 * slope * covariance
        torch.testing.assert_close(guided(some(schedule, t), t), expected)


@pytest.mark.parametrize("name", ["scaled_linear", "ve", "flow"])
def test_a_gradient_that_stops_at_the_estimate_is_exact_for_data_of_unit_variance(name):
    schedule, data = SCHEDULES[name], Mixture((1.0,), (0.3,), (1.0,))
    through, short = (
        by_estimate(denoiser_of(data, schedule), lambda z_0, t: z_0.sin().sum(1), 1.5, schedule, through)
        for through in (True, False)
    )
    for t in (0.05, 0.5, 0.95):
        torch.testing.assert_close(through(some(schedule, t), t), short(some(schedule, t), t))


def test_a_gradient_that_stops_at_the_estimate_never_differentiates_the_denoiser_and_works_at_pure_noise():
    schedule = SCHEDULES["flow"]

    def denoise(z_t, t):
        assert not z_t.requires_grad
        return torch.zeros_like(z_t)

    z_0 = by_estimate(denoise, lambda z, t: 0.5 * z.sum(1), 1.0, schedule, through=False)(some(schedule, 1.0), 1.0)
    torch.testing.assert_close(z_0, torch.full_like(z_0, 0.5))


@pytest.mark.parametrize("name", ["flow", "zero_terminal"])
def test_guidance_at_pure_noise_is_refused_with_a_fix(name):
    schedule = SCHEDULES[name]
    untold = denoiser_of(TWO, schedule)
    for guided in (by_gradient(untold, classes(schedule), 1.0, schedule), by_estimate(untold, None, 1.0, schedule)):
        with pytest.raises(ValueError, match="undefined at t = 1.0, where alpha is 0: .*; guide in_interval"):
            guided(some(schedule, 1.0), 1.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_in_the_class_that_a_classifier_asks_for(sampler):
    schedule, steps = SCHEDULES["scaled_linear"], 12
    guided = by_gradient(denoiser_of(TWO, schedule), classes(schedule), 1.0, schedule)
    time_defaults = SAMPLERS[sampler].time_defaults
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    z = torch.stack([torch.randn(1, 8, 8, dtype=torch.float64, generator=generator) for generator in generators])
    with torch.inference_mode():
        *_, last = SAMPLERS[sampler].run(
            guided, z, times(schedule, steps, time_defaults=time_defaults), schedule, generators
        )
    assert last.z.isfinite().all()
    assert last.z.mean().item() == pytest.approx(TWO.means[1], abs=0.3)  # untold: 0.26


@pytest.mark.parametrize("trained", [True, False], ids=["parameters with gradients", "frozen"])
def test_gradients_through_a_network_and_its_context_are_the_same_in_inference_mode(trained):
    """As `TextToImage.sample` calls it; the network has read the same context in inference mode before."""
    unet = random_unet(SMALL).requires_grad_(trained)
    schedule = SCHEDULES["scaled_linear"]
    z_t, tokens = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), context().tokens

    def score(z_0, t):
        return -z_0.square().flatten(1).mean(1)

    def run(z_t):
        condition = Context(tokens=tokens + 0.0)  # made in the mode of the caller
        denoiser = Denoiser(CachedUNet(unet), schedule, "velocity")
        plain = classifier_free(denoiser, condition, None, 1.0)
        guided = [by_estimate(plain, score, 50.0, schedule, through) for through in (True, False)]
        both = classifier_free(denoiser, condition, Context(tokens=condition.tokens * 0), 3.0)
        guided += [by_gradient(both, score, 50.0, schedule), by_estimate(both, score, 50.0, schedule)]
        return [plain(z_t, 0.6), *(denoise(z_t, 0.6) for denoise in guided)]

    outside = run(z_t)
    with torch.inference_mode():
        inside = run(z_t + 0.0)
    assert not inside[1].requires_grad
    for one, other in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, other.detach())
    assert not torch.allclose(inside[0], inside[1])


def test_a_guided_walk_in_inference_mode_lets_no_graph_grow():
    schedule = SCHEDULES["scaled_linear"]
    guided = by_estimate(denoiser_of(TWO, schedule), lambda z_0, t: z_0.flatten(1).sum(1), 1.0, schedule)
    steps = list(ddim(guided, some(schedule, 1.0), times(schedule, 5), schedule, []))
    assert not any(step.z.requires_grad or step.z.grad_fn for step in steps)


def test_scale_0_calls_no_score_and_a_scale_that_is_no_number_is_refused():
    denoise = denoiser_of(TWO, SCHEDULES["flow"])
    assert by_gradient(denoise, None, 0.0, SCHEDULES["flow"]) is denoise
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"guidance scale {scale} must be a finite number"):
            by_gradient(denoise, None, scale, SCHEDULES["flow"])
