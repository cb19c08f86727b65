"""Samplers that draw noise, against exact distributions: their moments without chance, and 100,000 samples of each.

Langevin dynamics are in test_langevin.py, diffusers in test_stochastic_interop.py.
"""

import math
import weakref

import pytest
import torch

from ldm.denoising.denoiser import Denoiser
from ldm.denoising.learned_variance import LearnedVariance
from ldm.samplers.heun import heun
from ldm.samplers.onestep import ddim, ddpm, euler, euler_ancestral
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise, noise_like
from ldm.samplers.stochastic import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, lcm, restart
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
SDES = [ddpm, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde]  # whose steps follow the reverse process
SHORT = torch.tensor([0.6, 0.4], dtype=torch.float64)


def levels(schedule, t):
    return tuple(level.item() for level in schedule(t))


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def marginal(schedule, t):
    """Mean and variance of z_t where the data are GAUSSIAN."""
    alpha, sigma = levels(schedule, t)
    return alpha * GAUSSIAN.means[0], (alpha * GAUSSIAN.stds[0]) ** 2 + sigma**2


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize(
    ("sampler", "steps", "options"),
    [
        (ddpm, 400, {}),
        (ddpm, 400, {"variance": "large"}),
        (dpmpp_sde, 80, {}),
        (dpmpp_2m_sde, 80, {}),
        (dpmpp_3m_sde, 80, {}),
        (restart, 80, {"restarts": 2}),
        (heun, 80, {"churn": 20.0}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ("-".join(map(str, value)) if value == {} else str(value)),
)
def test_samples_have_the_moments_and_the_weights_of_a_mixture(name, sampler, steps, options):
    """In 80 steps of second order or 400 of first the error of discretization is below that of 100,000 samples."""
    schedule = SCHEDULES[name]
    assert_draws_two(sampler, schedule, by_ratio(schedule, 14.0, 0.03, steps), **options)


@pytest.mark.parametrize("sampler", [ddpm, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, restart, heun])
def test_samples_have_the_covariance_of_correlated_data(sampler):
    """60 steps, 550 for first order."""
    schedule, options = SCHEDULES["linear"], {"churn": 20.0} if sampler is heun else {}
    steps = 550 if sampler is ddpm else 60
    assert_draws_correlated(sampler, schedule, by_ratio(schedule, 14.0, 0.03, steps), **options)


def test_the_mixture_in_closed_form_is_that_of_the_oracle():
    z = torch.linspace(-3, 3, 31, dtype=torch.float64)
    for schedule in SCHEDULES.values():
        for t in (0.01, 0.3, 0.8):
            torch.testing.assert_close(two(schedule)(z, t), denoiser_of(TWO, schedule)(z, t), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["zero_terminal", "ve", "flow"])  # which begin in noise that knows nothing of data
@pytest.mark.parametrize("steps", [1, 4])
def test_consistency_sampling_is_exact_at_any_number_of_steps(name, steps):
    """With the function that follows the probability flow to t = 0; the mean of z_0 would lose variance."""
    schedule = SCHEDULES[name]

    def consistency(z, t):
        """Interpolated between 4,001 exact points: quantiles of z_t to those of the data."""
        alpha, sigma = levels(schedule, t)
        grid = torch.linspace(-7, 7, 4001, dtype=torch.float64) * math.hypot(alpha, sigma)
        ends = TWO.flow(grid, (alpha, sigma), (1.0, 0.0))
        place = ((z.double() - grid[0]) / (grid[1] - grid[0])).clamp(0, 3999)
        below = place.long()
        return torch.lerp(ends[below], ends[below + 1], place - below).to(z.dtype)

    assert_draws_two(lcm, schedule, times(schedule, steps), consistency)
    if steps > 1:
        with pytest.raises(AssertionError, match="variance"):
            assert_draws_two(lcm, schedule, times(schedule, steps))


def conditional(schedule, t, s, z_t):
    """Mean and variance of z_s given z_t in the reverse process of GAUSSIAN: by the joint normal of the two."""
    (mean_t, variance_t), (mean_s, variance_s) = marginal(schedule, t), marginal(schedule, s)
    covariance = levels(schedule, t)[0] / levels(schedule, s)[0] * variance_s
    return mean_s + covariance / variance_t * (z_t - mean_t), variance_s - covariance**2 / variance_t


@pytest.mark.parametrize("name", THREE)
def test_moments_of_the_reverse_process_converge_at_their_order(name, monkeypatch):
    """From a given z_t far from the mean. The mean is exact at any number of steps: of all that the reverse process may
    do, estimates of z_0 have the same mean at every time. A parabola makes the error of the variance smaller, not its
    order higher (gains of 6.1, 5.6, 5.1, ... for 4)."""
    schedule, denoise = SCHEDULES[name], denoiser_of(GAUSSIAN, SCHEDULES[name])
    start, stop = schedule.time(3.0).item(), schedule.time(0.3).item()
    z_t = marginal(schedule, start)[0] + 2.0 * levels(schedule, start)[1]
    mean, variance = conditional(schedule, start, stop, z_t)
    errors = {}
    for sampler in SDES:
        errors[sampler] = []
        for steps in (40, 80):
            walk = by_ratio(schedule, 3.0, 0.3, steps, clean=False)
            found = moments(sampler, denoise, schedule, walk, z_t, 0.0, monkeypatch)
            assert found[0] == pytest.approx(mean, rel=1e-9)
            errors[sampler].append(abs(found[1] - variance))
    gains = {sampler: first / second for sampler, (first, second) in errors.items()}
    assert gains[ddpm] == pytest.approx(2, rel=0.2)
    assert gains[dpmpp_sde] == pytest.approx(4, rel=0.2)
    assert gains[dpmpp_2m_sde] == pytest.approx(4, rel=0.2)
    assert 4 < gains[dpmpp_3m_sde] < 8 and errors[dpmpp_3m_sde][1] < errors[dpmpp_2m_sde][1] / 3


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("sampler", [restart, heun])
def test_the_variance_of_samplers_that_add_noise_to_an_ode_is_of_second_order(name, sampler, monkeypatch):
    schedule, options = SCHEDULES[name], {"churn": 8.0} if sampler is heun else {"low": 0.5}
    start, stop = schedule.time(5.0).item(), schedule.time(0.2).item()
    errors = []
    for steps in (60, 120):
        walk = by_ratio(schedule, 5.0, 0.2, steps, clean=False)
        found = moments(
            sampler, denoiser_of(GAUSSIAN, schedule), schedule, walk, *marginal(schedule, start), monkeypatch, **options
        )
        mean, variance = marginal(schedule, stop)
        assert found[0] == pytest.approx(mean, abs=1e-9)
        errors.append(abs(found[1] - variance))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("sampler", [*SDES, restart, lcm, heun], ids=lambda sampler: sampler.__name__)
def test_every_schedule_makes_the_same_of_the_same_noise_at_the_same_ratios(sampler):
    """z / alpha depends on sigma / alpha alone, whatever alpha: samplers work in the coordinates of any schedule."""
    options, ends = {"churn": 9.0} if sampler is heun else {}, []
    for schedule in (SCHEDULES[name] for name in ("scaled_linear", "ve", "sub_vp")):
        walk = by_ratio(schedule, 10.0, 0.03, 9)
        z = torch.linspace(-20, 20, 7, dtype=torch.float64)[None] * levels(schedule, walk[0].item())[0]
        ends.append(last(sampler(denoiser_of(TWO, schedule), z, walk, schedule, seeds(1), **options)).z)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", THREE)
def test_ancestral_samplers_of_first_order_are_one(name):
    """SDE-DPM-Solver++ of first order (Lu et al. 2022b, eq. 18), ddim with eta 1, ddpm and euler_ancestral."""
    schedule = SCHEDULES[name]
    walk, z = times(schedule, 6)[1:], initial_noise((2, 5), seeds(2), schedule).double()
    denoise, by_hand, generators = denoiser_of(TWO, schedule), z, seeds(2, 9)
    others = [
        ddim(denoise, z, walk, schedule, seeds(2, 9), eta=1.0),
        ddpm(denoise, z, walk, schedule, seeds(2, 9)),
        euler_ancestral(denoise, z, walk, schedule, seeds(2, 9)),
        sde_of_first_order(denoise, z, walk, schedule, seeds(2, 9)),
    ]
    for i, steps in enumerate(zip(*others, strict=True)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, walk[i]), levels(schedule, walk[i + 1])
        z_0 = denoise(by_hand, walk[i].item())
        if sigma_s:
            decay = math.exp(-(math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)))
            by_hand = sigma_s / sigma_t * decay * by_hand + alpha_s * (1 - decay**2) * z_0
            by_hand = by_hand + sigma_s * math.sqrt(1 - decay**2) * noise_like(by_hand, generators)
        else:
            by_hand = z_0
        for step in steps:
            torch.testing.assert_close(step.z, by_hand, rtol=0, atol=1e-10)


def sde_of_first_order(denoise, z, walk, schedule, generators):
    """`dpmpp_3m_sde` that is made to forget: each step a walk of its own."""
    for pair in zip(walk[:-1], walk[1:], strict=True):
        step = next(dpmpp_3m_sde(denoise, z, torch.stack(pair), schedule, generators))
        z = step.z
        yield step


@pytest.mark.parametrize("sampler", SDES, ids=lambda sampler: sampler.__name__)
def test_without_its_noise_a_step_is_the_mean_of_the_posterior(sampler, monkeypatch):
    """Where z_0 is the same everywhere: all orders are the posterior of Bayes then, its mean and its variance."""
    schedule = SCHEDULES["flow"]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, SHORT[0]), levels(schedule, SHORT[1])
    ratio = alpha_t / alpha_s
    precision = 1 / sigma_s**2 + ratio**2 / (sigma_t**2 - ratio**2 * sigma_s**2)
    mean = (alpha_s * -0.4 / sigma_s**2 + ratio * 0.9 / (sigma_t**2 - ratio**2 * sigma_s**2)) / precision
    for walk in (SHORT, torch.linspace(0.6, 0.4, 6, dtype=torch.float64)):
        found = moments(sampler, lambda z, t: torch.full_like(z, -0.4), schedule, walk, 0.9, 0.0, monkeypatch)
        assert found == pytest.approx((mean, 1 / precision), rel=1e-12)


def test_large_is_right_for_normal_data_and_small_for_a_single_picture(monkeypatch):
    """Ho et al. 2020, section 3.2: one long step of `ddpm` has the exact moments then, where variance is preserved."""
    schedule = SCHEDULES["scaled_linear"]
    (alpha_t, sigma_t), (_, sigma_s) = levels(schedule, SHORT[0]), levels(schedule, SHORT[1])
    normal = moments(ddpm, lambda z, t: alpha_t * z, schedule, SHORT, 0.0, 1.0, monkeypatch, variance="large")
    assert normal == pytest.approx((0, 1), abs=1e-12)
    single = moments(
        ddpm, lambda z, t: torch.zeros_like(z), schedule, SHORT, 0.0, sigma_t**2, monkeypatch, variance="small"
    )
    assert single == pytest.approx((0, sigma_s**2), abs=1e-12)


@pytest.mark.parametrize("name", [*THREE, "zero_terminal", "edm"])
def test_learned_variance_lies_between_small_and_large(name):
    """Interpolation 0 is small, 1 is large, 1/2 the geometric mean of both (Nichol & Dhariwal 2021, eq. 15)."""
    schedule = SCHEDULES[name]
    walk, z = times(schedule, 5), initial_noise((2, 3, 4), seeds(2), schedule).double()

    def drawn(**options):
        return [step.z for step in ddpm(lambda z, t: 0 * z, z, walk, schedule, seeds(2, 5), **options)]

    def learned(v):
        return drawn(variance="learned", interpolation=lambda: torch.full((4, 3, 4), v, dtype=torch.float32))

    small, large = drawn(), drawn(variance="large")
    for stipple, exact in ((learned(0.0), small), (learned(1.0), large)):
        assert all(torch.equal(one, other) for one, other in zip(stipple, exact, strict=True))
    middle = learned(0.5)
    mean = next(ddpm(lambda z, t: 0 * z, z, walk, schedule, seeds(2, 5), variance="learned", interpolation=nothing)).z
    torch.testing.assert_close((middle[0] - mean) ** 2, (small[0] - mean) * (large[0] - mean), rtol=1e-9, atol=1e-12)
    assert torch.equal(small[-1], large[-1])  # no noise at t = 0


def nothing():
    return torch.full((2, 3, 4), -math.inf)  # a variance of 0


def test_a_network_of_twice_the_channels_outputs_its_variance():
    schedule, called = SCHEDULES["scaled_linear"], []

    def network(z_in, timestep, context):
        called.append(len(z_in))
        return torch.cat([0.1 * z_in, torch.tanh(z_in)], 1)  # [B, 2 c, h, w]

    wrapped = LearnedVariance(network)
    with pytest.raises(ValueError, match="has not been called yet"):
        wrapped.interpolation()
    denoise = Denoiser(wrapped, schedule, "noise")
    plain = Denoiser(lambda z_in, timestep, context: 0.1 * z_in, schedule, "noise")
    z = initial_noise((2, 3, 4, 4), seeds(2), schedule)
    assert torch.equal(denoise(z, 0.5), plain(z, 0.5))
    torch.testing.assert_close(wrapped.interpolation(), (torch.tanh(z) + 1) / 2)

    def guided(z_t, t):  # the conditional half is the first
        return denoise(torch.cat([z_t, -z_t]), t)[: len(z_t)]

    ends = [
        last(
            ddpm(
                one, z, times(schedule, 4), schedule, seeds(2), variance="learned", interpolation=wrapped.interpolation
            )
        )
        for one in (denoise, guided)
    ]
    assert called[-1] == 4 and torch.equal(ends[0].z, ends[1].z)


def test_churn_0_is_deterministic_and_churn_without_noise_steps_from_higher_up():
    schedule, denoise = SCHEDULES["ve"], denoiser_of(TWO, SCHEDULES["ve"])
    z, walk = initial_noise((2, 5), seeds(2), schedule).double(), times(schedule, 8)
    generators = seeds(2)
    before = [generator.get_state() for generator in generators]
    still = last(heun(denoise, z, walk, schedule, generators, churn=0.0)).z
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))
    outside = last(heun(denoise, z, walk, schedule, generators, churn=4.0, churn_range=(1e4, 1e5))).z
    assert torch.equal(still, outside)
    assert not torch.equal(still, last(heun(denoise, z, walk, schedule, generators, churn=4.0)).z)


def test_churn_adds_the_noise_of_karras_and_never_climbs_above_the_last_level(monkeypatch):
    """Algorithm 2: sigma_hat = sigma (1 + min(churn / S, sqrt 2 - 1)), and noise of variance sigma_hat^2 - sigma^2."""
    schedule, seen = SCHEDULES["ve"], []

    def denoise(z, t):
        seen.append((t, z.clone()))
        return torch.zeros_like(z)

    walk = torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64)
    with noise_of(torch.ones_like, monkeypatch):
        list(heun(denoise, torch.zeros(1, 1, dtype=torch.float64), walk, schedule, None, churn=0.5, noise_scale=1.1))
    (first, _), _, (raised, z), _ = seen
    sigma = levels(schedule, 0.6)[1]
    assert first == 1.0 and levels(schedule, raised)[1] == pytest.approx(1.25 * sigma)
    assert z.item() == pytest.approx(1.1 * sigma * math.sqrt(1.25**2 - 1))
    seen.clear()
    with noise_of(torch.ones_like, monkeypatch):
        list(heun(denoise, torch.zeros(1, 1, dtype=torch.float64), walk[1:], schedule, None, churn=1e9))
    assert levels(schedule, seen[0][0])[1] == pytest.approx(math.sqrt(2) * sigma)


def test_restart_without_restarts_is_heun_and_restarts_where_documented():
    schedule, denoise, heights = SCHEDULES["scaled_linear"], denoiser_of(TWO, SCHEDULES["scaled_linear"]), []

    def watched(z, t):
        alpha, sigma = levels(schedule, t)
        heights.append(sigma / alpha)
        return denoise(z, t)

    z, walk = initial_noise((2, 5), seeds(2), schedule).double(), by_ratio(schedule, 14.0, 0.03, 12)
    plain = last(heun(denoise, z, walk, schedule, seeds(2))).z
    assert torch.equal(plain, last(restart(denoise, z, walk, schedule, seeds(2), restarts=0)).z)
    last(restart(watched, z, walk, schedule, seeds(2), restarts=3, low=0.2, high=1.5))
    climbs = [(low, high) for low, high in zip(heights[:-1], heights[1:], strict=True) if high > low * 1.01]
    assert len(climbs) == 3 and all(high == pytest.approx(1.5) for _, high in climbs)
    assert len({low for low, _ in climbs}) == 1 and climbs[0][0] <= 0.2 < 2 * climbs[0][0]
    assert len(heights) == 2 * 12 - 1 + 3 * 2 * 6


def test_restarts_forget_the_errors_of_long_steps():
    """Xu et al. 2023, theorem 1: after 8 long steps of Heun, restarts bring the variance closer to that of the data."""
    schedule, errors = SCHEDULES["scaled_linear"], []
    for restarts in (0, 4):
        z = initial_noise((1, 20_000), seeds(1), schedule).double()
        walk = by_ratio(schedule, 14.0, 0.05, 8)
        z = last(restart(two(schedule), z + 1.0, walk, schedule, seeds(1, 7), restarts=restarts)).z
        errors.append(abs(z.mean().item() - 0.26))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if SAMPLERS[sampler].draws])
@pytest.mark.parametrize("name", SCHEDULES)
def test_walks_may_be_long_and_end_at_the_first_level(name, sampler):
    """1,000 steps from t = 1, 50 of those with several network calls; and few that end at the first level, twice."""
    schedule = SCHEDULES[name]
    lowest = 1 / schedule.config.timesteps
    short = torch.tensor([1.0, 0.7, 0.2, lowest, lowest], dtype=torch.float64)
    for walk in (times(schedule, 1000 if sampler in ("ddpm", "dpmpp_3m_sde") else 50), short):
        z = initial_noise((1, 6), seeds(1), schedule)
        end = last(SAMPLERS[sampler].run(two(schedule), z, walk, schedule, seeds(1)))
        assert end.t == walk[-1] and end.z.isfinite().all() and end.z.dtype == torch.float32
        assert end.z.abs().max() < 10 or sampler in ("langevin", "predictor_corrector")  # which need many steps


def test_stochastic_samplers_hold_no_more_estimates_than_their_order_needs():
    """Tensors made by the network that are alive while it is called again."""
    schedule, alive = SCHEDULES["scaled_linear"], []

    def denoise(z, t):
        z_0 = two(schedule)(z, t)
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(z_0))
        return z_0

    most = {dpmpp_sde: 2, dpmpp_2m_sde: 1, dpmpp_3m_sde: 2, restart: 2, lcm: 1}
    for sampler, allowed in most.items():
        counts, alive[:] = [], []
        for step in sampler(denoise, torch.ones(1, 3), times(schedule, 20), schedule, seeds(1)):
            del step
        assert max(counts) <= allowed, sampler.__name__


def test_wrong_options_raise_a_message_that_names_the_error():
    schedule = SCHEDULES["flow"]
    asked = (lambda z, t: z, torch.ones(1, 1), times(schedule, 2), schedule, seeds(1))
    for run, options, message in (
        (ddpm, {"variance": "medium"}, "unknown variance 'medium'; use one of small, large, learned"),
        (ddpm, {"variance": "learned"}, "requires a network that outputs it; use small or large"),
        (heun, {"churn": -1.0}, "churn -1.0 must be at least 0"),
        (heun, {"churn": math.nan}, "churn nan must be at least 0"),
        (restart, {"restarts": -1}, "restarts -1 must be at least 0"),
        (restart, {"low": 2.0}, "not 2.0 and 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(run(*asked, **options))
    with pytest.raises(ValueError, match="outputs 2 channels, a learned variance needs 4"):
        LearnedVariance(lambda z, timestep, context: z)(torch.ones(1, 2, 3, 3), torch.ones(1))
    assert next(euler(*asked)).z.isfinite().all()
