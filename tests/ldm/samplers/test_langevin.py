"""ldm/samplers/langevin.py against exact distributions, and against diffusers' reverse diffusion and corrector."""

import math

import diffusers
import pytest
import torch

from ldm.samplers.langevin import langevin, predictor_corrector
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise, noise_like
from tests.helpers.proofs.moments import (
    assert_draws_correlated,
    assert_draws_two,
    by_ratio,
    last,
    moments,
    noise_of,
    two,
)
from tests.helpers.proofs.oracles import GAUSSIAN, SCHEDULES, TWO, denoiser_of

THREE = ["scaled_linear", "ve", "flow"]


def levels(schedule, t):
    return tuple(level.item() for level in schedule(t))


def seeds(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("name", THREE)
def test_annealed_langevin_samples_have_the_moments_and_the_weights_of_a_mixture(name):
    """80 levels with 12 steps each, of size 1: what counts is how often modes are visited while they still touch."""
    schedule = SCHEDULES[name]
    assert_draws_two(langevin, schedule, by_ratio(schedule, 14.0, 0.05, 80), corrections=12, step_size=1.0)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("corrections", [0, 1])
def test_predictor_corrector_samples_have_the_moments_and_the_weights_of_a_mixture(name, corrections):
    """200 steps; corrections a third as long as the paper's, whose variance is off by more than the samples show."""
    schedule = SCHEDULES[name]
    walk = by_ratio(schedule, 14.0, 0.03, 200)
    assert_draws_two(predictor_corrector, schedule, walk, corrections=corrections, snr=0.05)


def test_annealed_langevin_samples_have_the_covariance_of_correlated_data():
    """Half as many corrections more than the mixture needs."""
    walk = by_ratio(SCHEDULES["ve"], 14.0, 0.05, 80)
    assert_draws_correlated(langevin, SCHEDULES["ve"], walk, corrections=18, step_size=1.0)


def test_predictor_corrector_samples_have_the_covariance_of_correlated_data():
    walk = by_ratio(SCHEDULES["ve"], 14.0, 0.03, 350)
    assert_draws_correlated(predictor_corrector, SCHEDULES["ve"], walk, snr=0.05)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("step_size", [0.2, 1.0])
def test_many_langevin_steps_forget_where_they_began_and_leave_the_bias_of_their_size(name, step_size, monkeypatch):
    """At one level, variance v / (1 - step sigma^2 / 4 v): what an unadjusted Langevin step keeps."""
    schedule = SCHEDULES[name]
    walk = torch.tensor([schedule.time(1.5), schedule.time(1.0)])
    alpha, sigma = levels(schedule, walk[1])
    variance = (alpha * GAUSSIAN.stds[0]) ** 2 + sigma**2
    monkeypatch.setattr("tests.helpers.proofs.moments.DRAWS_PER_STEP", 250)
    found = moments(
        langevin, denoiser_of(GAUSSIAN, schedule), schedule, walk, 3.0, 2.0, monkeypatch,
        corrections=400, step_size=step_size,
    )  # fmt: skip
    assert found[0] == pytest.approx(alpha * GAUSSIAN.means[0], abs=1e-9)
    assert found[1] == pytest.approx(variance / (1 - step_size * sigma**2 / (4 * variance)), rel=1e-9)


def test_corrections_inflate_the_variance_by_their_signal_to_noise_ratio():
    """(1 + r^2) v of a Gaussian in many dimensions: 2.6 % too much at the paper's r of 0.16."""
    schedule = SCHEDULES["ve"]
    walk = torch.tensor([0.5, 0.5], dtype=torch.float64)
    variance = GAUSSIAN.stds[0] ** 2 + levels(schedule, 0.5)[1] ** 2
    z = torch.randn(1, 100_000, generator=seeds(1)[0]) * math.sqrt(variance) + GAUSSIAN.means[0]
    for snr in (0.16, 0.5):
        denoise = denoiser_of(GAUSSIAN, schedule)
        end = last(predictor_corrector(denoise, z, walk, schedule, seeds(1), corrections=80, snr=snr)).z
        assert end.var().item() == pytest.approx(variance * (1 + snr**2), rel=5 * math.sqrt(2 / 100_000))


def test_langevin_steps_are_those_of_song_and_ermon():
    """Algorithm 1 with epsilon = 2e-5 and sigma_L = 0.01, and the last denoising; the size of a step is 0.2 sigma^2."""
    schedule, epsilon = SCHEDULES["ve"], 2e-5
    walk = times(schedule, 6)
    z = by_hand = initial_noise((2, 3), seeds(2), schedule).double()
    denoise, generators = denoiser_of(TWO, schedule), seeds(2)
    for t in walk[1:-1].tolist():
        sigma = levels(schedule, t)[1]
        size = epsilon * sigma**2 / 0.01**2
        for _ in range(7):
            score = (denoise(by_hand, t) - by_hand) / sigma**2
            by_hand = by_hand + size / 2 * score + math.sqrt(size) * noise_like(by_hand, generators)
    by_hand = denoise(by_hand, walk[-2].item())
    torch.testing.assert_close(last(langevin(denoise, z, walk, schedule, seeds(2), corrections=7)).z, by_hand)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "ve"])
def test_the_predictor_is_the_reverse_diffusion_of_the_paper(name, monkeypatch):
    """Song et al. 2021, algorithm 2 line 4 (VE) and algorithm 3 line 4 (VP), from betas and sigmas."""
    schedule = SCHEDULES[name]
    walk, z = torch.tensor([0.5, 0.499], dtype=torch.float64), torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, walk[0]), levels(schedule, walk[1])
    denoise, noise = denoiser_of(TWO, schedule), torch.ones_like(z)
    score = (alpha_t * denoise(z, 0.5) - z) / sigma_t**2
    if name == "ve":
        added = sigma_t**2 - sigma_s**2
        by_hand = z + added * score + math.sqrt(added) * noise
    else:
        beta = 1 - (alpha_t / alpha_s) ** 2
        by_hand = (2 - math.sqrt(1 - beta)) * z + beta * score + math.sqrt(beta) * noise
    with noise_of(torch.ones_like, monkeypatch):
        step = last(predictor_corrector(denoise, z, walk, schedule, None, corrections=0))
    torch.testing.assert_close(step.z, by_hand, rtol=0, atol=1e-9)


def test_predictor_corrector_is_that_of_diffusers(monkeypatch):
    """ScoreSdeVeScheduler, which corrects before it predicts; the first level needs no correction."""
    steps, schedule = 1000, SCHEDULES["ve"]
    scheduler = diffusers.ScoreSdeVeScheduler(steps, snr=0.16, sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    mine, reference = seeds(2)[1], seeds(2)[1]
    z = start = initial_noise((1, 2, 5, 5), seeds(1), schedule).double()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_sde_ve.randn_tensor",
        lambda shape, **_: noise_like(torch.empty(shape, dtype=torch.float64), [reference]),
    )
    for index in range(40):  # at sigma from 50 down
        sigma = scheduler.sigmas[index].double()
        score = lambda z, sigma=sigma: (TWO.denoise(z, 1.0, sigma.item()) - z) / sigma**2  # noqa: E731
        if index:
            z = scheduler.step_correct(score(z), z).prev_sample
        z = scheduler.step_pred(score(z), scheduler.timesteps[index], z).prev_sample
    walk = torch.arange(1000, 1000 - 41, -1, dtype=torch.float64) / 1000
    stipple = list(predictor_corrector(denoiser_of(TWO, schedule), start, walk, schedule, [mine]))
    assert len(stipple) == 40
    by_sigma = levels(schedule, 0.96)[1]
    corrected = scheduler.step_correct((TWO.denoise(z, 1.0, by_sigma) - z) / by_sigma**2, z).prev_sample
    torch.testing.assert_close(stipple[-1].z, corrected, rtol=1e-4, atol=1e-4)


def test_wrong_options_raise_a_message_that_names_the_error():
    schedule = SCHEDULES["flow"]
    asked = (two(schedule), torch.ones(1, 2), times(schedule, 2), schedule, seeds(1))
    for run, options, message in (
        (langevin, {"corrections": 0}, "corrections 0 must be at least 1"),
        (langevin, {"step_size": 4.0}, "step size 4.0 must be above 0 and below 4"),
        (predictor_corrector, {"corrections": -1}, "corrections -1 must be at least 0"),
        (predictor_corrector, {"snr": 1.0}, "snr 1.0 must be above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            next(run(*asked, **options))
