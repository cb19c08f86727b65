"""ldm/samplers.py against exact solutions, against each other, and against diffusers where both mean the same.

Where diffusers' definitions differ from ours, so that no parity is tested:
- Its last alpha is 1 by default, as ours; Stable Diffusion's DDIM config (set_alpha_to_one false) stops at index 0.
- With 1 step of linspace its sampling begins at its lowest time, ours at t = 1. With a step count that does not divide
  1000 its leading times take the rounded-down stride and never reach the high times; ours spread over all.
- DDIMScheduler steps to t - 1000 // steps, which is not where its own linspace times go next; trailing, leading agree.
- EulerDiscreteScheduler and HeunDiscreteScheduler with linspace use fractional times, and interpolate sigma linearly
  where we interpolate its logarithm; on trailing and leading all agree. They hold z_t / alpha where we hold z_t.
- DPMSolverMultistepScheduler spaces leading and linspace with one step more; trailing agrees.
- Heun on a schedule whose alpha at t = 1 is below 1e-3 (cosine, zero terminal SNR): ours runs in rectified flow's
  coordinates. Zero terminal SNR itself: diffusers replaces the last alpha of 0 by 2^-12.
"""

import math

import pytest
import torch
from oracles import GAUSSIAN, SCHEDULES, TWO, denoiser_of

from ldm.denoiser import Denoiser
from ldm.samplers import SAMPLERS, ddim, ddpm, initial_noise
from ldm.schedule import ScheduleConfig, make_schedule, times

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}
CALLS = {"ddim": 10, "ddpm": 10, "euler": 10, "heun": 19, "dpmpp_2m": 10}  # of the network in 10 steps


def levels(schedule, t):
    return tuple(level.item() for level in schedule(t))


def walk_from(start, stop, steps):
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def last(steps):
    *_, step = steps
    return step


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "zero_terminal", "ve", "flow"])
def test_deterministic_samplers_converge_to_the_probability_flow_at_their_order(name, data, sampler):
    """From t = 1 even where no signal is left there. dpmpp_2m's logarithm makes its constant on flow large near both
    ends (2.9, 3.2, 3.4, ... for 4), so there it starts and stops inside."""
    schedule = SCHEDULES[name]
    inside = name == "flow" and sampler == "dpmpp_2m"
    start, stop = (0.9 if inside else 1.0), (0.0 if name == "flow" and not inside else 0.2)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * math.hypot(*levels(schedule, start))
    exact = data.flow(z, levels(schedule, start), levels(schedule, stop))
    errors = []
    for steps in (160, 320) if inside else (80, 160):
        end = last(SAMPLERS[sampler](denoiser_of(data, schedule), z, walk_from(start, stop, steps), schedule, seeds(9)))
        assert end.t == stop
        errors.append((end.z - exact).abs().mean().item())
    assert errors[0] / errors[1] == pytest.approx(2 ** ORDERS[sampler], rel=0.2)
    assert errors[1] < (0.02 if ORDERS[sampler] == 1 else 5e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samplers_end_in_the_last_estimate_however_few_the_steps(name, sampler, steps):
    """At t = 0 there is no noise; with one step from t = 1 the result is the estimate made there."""
    schedule = SCHEDULES[name]
    z = initial_noise((3, 2, 4, 4), seeds(3), schedule).double()
    walked = list(SAMPLERS[sampler](denoiser_of(TWO, schedule), z, times(schedule, steps), schedule, seeds(3)))
    assert [step.index for step in walked] == list(range(steps)) and walked[-1].t == 0
    assert [step.t for step in walked] == times(schedule, steps)[1:].tolist()
    assert all(step.z.isfinite().all() for step in walked)
    torch.testing.assert_close(walked[-1].z, walked[-1].z_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(walked[0].z_0, denoiser_of(TWO, schedule)(z, 1.0))


def test_ddim_is_euler_for_rectified_flow():
    """z + (s - t) v with v = noise - z_0, the step of Liu et al. 2022."""
    schedule, denoise = SCHEDULES["flow"], denoiser_of(TWO, SCHEDULES["flow"])
    z = initial_noise((4, 1, 3, 3), seeds(4), schedule).double()
    walk = times(schedule, 13)
    by_hand = z
    walked = zip(ddim(denoise, z, walk, schedule, []), SAMPLERS["euler"](denoise, z, walk, schedule, []), strict=True)
    for i, (one, other) in enumerate(walked):
        t, s = walk[i].item(), walk[i + 1].item()
        by_hand = by_hand + (s - t) * (by_hand - denoise(by_hand, t)) / t
        torch.testing.assert_close(one.z, by_hand, rtol=0, atol=1e-12)
        torch.testing.assert_close(other.z, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_along_straight_lines_is_ddim_for_every_schedule(name):
    schedule, denoise = SCHEDULES[name], denoiser_of(TWO, SCHEDULES[name])
    z = initial_noise((4, 1, 3, 3), seeds(4), schedule).double()
    ends = [last(SAMPLERS[s](denoise, z, times(schedule, 20), schedule, [])).z for s in ("ddim", "euler")]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_1_is_ddpm(name):
    schedule, denoise = SCHEDULES[name], denoiser_of(TWO, SCHEDULES[name])
    z = initial_noise((4, 1, 3, 3), seeds(4), schedule).double()
    walked = zip(
        ddim(denoise, z, times(schedule, 12), schedule, seeds(4, 50), eta=1.0),
        ddpm(denoise, z, times(schedule, 12), schedule, seeds(4, 50)),
        strict=True,
    )
    for one, other in walked:
        torch.testing.assert_close(one.z, other.z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "ve", "flow"])
def test_a_ddpm_step_draws_from_the_posterior_of_bayes(name):
    """q(z_s | z_t, z_0) by the product of the two normals q(z_t | z_s) and q(z_s | z_0), not by the formula used."""
    schedule, t, s, z_t, z_0 = SCHEDULES[name], 0.5, 0.35, 0.9, -0.4
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
    ratio = alpha_t / alpha_s
    added = sigma_t**2 - ratio**2 * sigma_s**2
    precision = 1 / sigma_s**2 + ratio**2 / added
    mean = (alpha_s * z_0 / sigma_s**2 + ratio * z_t / added) / precision
    for sampler in (ddpm, lambda *a: ddim(*a, eta=1.0)):
        z = torch.full((1, 200_000), z_t, dtype=torch.float64)
        walk = torch.tensor([t, s], dtype=torch.float64)
        drawn = next(sampler(lambda z, t: torch.full_like(z, z_0), z, walk, schedule, seeds(1))).z
        assert drawn.mean().item() == pytest.approx(mean, abs=5 * (1 / precision / 200_000) ** 0.5)
        assert drawn.var().item() == pytest.approx(1 / precision, rel=5 * (2 / 200_000) ** 0.5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["scaled_linear", "flow"])
def test_stochastic_samples_have_the_moments_and_the_weights_of_the_data(name, eta):
    """Steps are enough for discretization to stay below the Monte Carlo error of 10,000 samples (taken five-fold)."""
    schedule, count = SCHEDULES[name], 10_000
    z = initial_noise((1, count), seeds(1), schedule).double()
    sampled = last(ddim(denoiser_of(TWO, schedule), z, times(schedule, 200), schedule, seeds(1, 9), eta=eta)).z[0]
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (TWO.weights, TWO.means, TWO.stds))
    mean = (w * m).sum().item()
    variance = (w * (m**2 + s**2)).sum().item() - mean**2
    assert sampled.mean().item() == pytest.approx(mean, abs=5 * (variance / count) ** 0.5)
    assert sampled.var().item() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)
    middle = TWO.cdf(torch.zeros(1, dtype=torch.float64), 1.0, 0.0).item()
    assert (sampled < 0).double().mean().item() == pytest.approx(middle, abs=5 * 0.5 / count**0.5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["scaled_linear", "ve", "flow"])
def test_a_picture_does_not_depend_on_its_batch(name, sampler):
    schedule, options = SCHEDULES[name], {"eta": 0.7} if sampler == "ddim" else {}

    def sample(which):
        generators = [torch.Generator().manual_seed(100 + i) for i in which]
        z = initial_noise((len(which), 2, 4, 4), generators, schedule)
        walk = times(schedule, 9)
        return last(SAMPLERS[sampler](denoiser_of(TWO, schedule), z, walk, schedule, generators, **options)).z

    together = sample([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(sample([i])[0], together[i])
    assert torch.equal(sample([3, 1]), together[[3, 1]])


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_deterministic_samplers_do_not_draw(sampler):
    generators = seeds(2)
    before = [g.get_state() for g in generators]
    schedule = SCHEDULES["scaled_linear"]
    last(SAMPLERS[sampler](denoiser_of(TWO, schedule), torch.zeros(2, 3), times(schedule, 5), schedule, generators))
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


@pytest.mark.parametrize(("sampler", "calls"), CALLS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samplers_call_the_denoiser_as_often_as_they_say_and_keep_the_dtype(sampler, calls, dtype):
    schedule, called = SCHEDULES["scaled_linear"], []

    def denoise(z, t):
        called.append(t)
        assert z.dtype == dtype and isinstance(t, float) and t > 0
        return denoiser_of(TWO, schedule)(z, t)

    z = torch.ones(2, 3, dtype=dtype)
    assert last(SAMPLERS[sampler](denoise, z, times(schedule, 10), schedule, seeds(2))).z.dtype == dtype
    assert len(called) == calls


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_stops_where_its_caller_stops(sampler):
    schedule, called = SCHEDULES["scaled_linear"], []
    walk = times(schedule, 10)
    steps = SAMPLERS[sampler](lambda z, t: called.append(t) or z, torch.ones(1, 3), walk, schedule, seeds(1))
    next(steps)
    next(steps)
    steps.close()
    assert len(called) <= 4


def test_initial_noise_has_the_variance_of_noised_unit_latents():
    for name, std in [("scaled_linear", 1), ("zero_terminal", 1), ("flow", 1), ("ve", (1 + 50**2) ** 0.5)]:
        z = initial_noise((1, 100_000), seeds(1), SCHEDULES[name])
        assert z.std().item() == pytest.approx(std, rel=0.01) and z.dtype == torch.float32


def test_wrong_requests_say_what_is_wrong():
    schedule = SCHEDULES["flow"]
    with pytest.raises(ValueError, match="3 images need as many generators, not 2"):
        initial_noise((3, 4), seeds(2), schedule)
    with pytest.raises(ValueError, match="eta 1.5"):
        next(ddim(lambda z, t: z, torch.ones(1, 1), times(schedule, 2), schedule, seeds(1), eta=1.5))
    for walk in ([1.0], [0.5, 0.5, 0.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="each below the one before"):
            next(ddim(lambda z, t: z, torch.ones(1, 1), torch.tensor(walk), schedule, seeds(1)))


# Parity with diffusers: a fixed network, full runs.

PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(z_in, timestep, context=None):
    """Fixed, smooth, of all its arguments."""
    phase = timestep.to(z_in.dtype).view(-1, 1, 1, 1) / 300
    return 0.9 * torch.tanh(z_in + 0.3 * z_in.roll(1, -1)) + 0.1 * torch.sin(phase)


def ours(sampler, prediction, spacing, steps, generators, schedule=SCHEDULES["scaled_linear"], **options):
    denoise = Denoiser(network, schedule, prediction)
    z = initial_noise((len(generators), 2, 5, 5), generators, schedule)
    return last(SAMPLERS[sampler](denoise, z, times(schedule, steps, spacing), schedule, generators, **options)).z


def theirs(scheduler, steps, generators, **options):
    """Run diffusers' scheduler; Euler and Heun hold z_t / alpha, and scale it back themselves for the network."""
    scheduler.set_timesteps(steps)
    z = torch.cat([torch.randn(1, 2, 5, 5, generator=g) for g in generators])
    z = z / scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])  # 1 where z_t itself is held
    scheduler.set_timesteps(steps)  # forgets that it was asked
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(z, t), t.expand(len(z)))
        z = scheduler.step(output, t, z, **options).prev_sample
    return z


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_that_of_diffusers(prediction, spacing):
    diffusers = pytest.importorskip("diffusers")
    options = {"timestep_spacing": spacing, "steps_offset": 1, "prediction_type": PREDICTION_TYPES[prediction]}
    scheduler = diffusers.DDIMScheduler(**BETAS, **options, clip_sample=False)
    end = theirs(scheduler, 50, seeds(2))
    torch.testing.assert_close(ours("ddim", prediction, spacing, 50, seeds(2)), end, rtol=1e-5, atol=1e-5)


def test_stochastic_ddim_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")
    generators = seeds(1)
    end = theirs(scheduler, 20, generators, eta=0.6, generator=generators[0])
    torch.testing.assert_close(ours("ddim", "noise", "trailing", 20, seeds(1), eta=0.6), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_ddpm_is_that_of_diffusers(prediction):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        **BETAS, clip_sample=False, timestep_spacing="trailing", prediction_type=PREDICTION_TYPES[prediction]
    )
    generators = seeds(1)
    end = theirs(scheduler, 50, generators, generator=generators[0])
    torch.testing.assert_close(ours("ddpm", prediction, "trailing", 50, seeds(1)), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_euler_and_heun_are_those_of_diffusers(sampler, prediction, spacing):
    diffusers = pytest.importorskip("diffusers")
    kind = {"euler": diffusers.EulerDiscreteScheduler, "heun": diffusers.HeunDiscreteScheduler}[sampler]
    scheduler = kind(**BETAS, timestep_spacing=spacing, steps_offset=1, prediction_type=PREDICTION_TYPES[prediction])
    end = theirs(scheduler, 25, seeds(2))
    torch.testing.assert_close(ours(sampler, prediction, spacing, 25, seeds(2)), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [4, 20])
def test_dpmpp_2m_is_that_of_diffusers(prediction, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, timestep_spacing="trailing", prediction_type=PREDICTION_TYPES[prediction]
    )
    end = theirs(scheduler, steps, seeds(2))
    torch.testing.assert_close(ours("dpmpp_2m", prediction, "trailing", steps, seeds(2)), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_flow_is_that_of_diffusers(shift):
    """Its own times stop at 1/1000 of the unshifted range, so ours are handed to it."""
    diffusers = pytest.importorskip("diffusers")
    schedule = make_schedule(ScheduleConfig(name="flow", shift=shift))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=times(schedule, 20)[:-1].tolist())
    z = torch.cat([torch.randn(1, 2, 5, 5, generator=g) for g in seeds(2)])
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t.expand(2)), t, z).prev_sample
    torch.testing.assert_close(ours("euler", "flow", "trailing", 20, seeds(2), schedule), z, rtol=1e-5, atol=1e-5)
