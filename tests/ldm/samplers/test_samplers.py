"""Samplers against exact solutions and against each other; for diffusers see tests/interop/test_sampler_interop.py."""

import gc
from dataclasses import replace

import pytest
import torch

from ldm.samplers.onestep import ddim, ddpm
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS, times
from ldm.samplers.steps import initial_noise
from tests.helpers.proofs.oracles import GAUSSIAN, SCHEDULES, TWO, denoiser_of

ALL_LEVELS = {  # walks of nearly all noise levels, and of all
    "scaled_linear": ((1000, torch.float32),),
    "zero_terminal": ((999, torch.float64),),
}
HELD = {  # z and the last estimate, which is also in the hands of the caller; and what else the order needs
    **dict.fromkeys(("ddim", "ddpm", "euler", "euler_ancestral", "lcm", "langevin", "dpmpp_2m"), 3),
    **dict.fromkeys(("dpmpp_2s", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde", "deis"), 3),
    **dict.fromkeys(("dpm2", "dpmpp_3m_sde", "unipc", "predictor_corrector"), 4),
    **dict.fromkeys(("heun", "restart", "lms"), 5),
    "pndm": 7,  # three outputs, their mean, and the other end of the first step
    "ode": 11,  # seven slopes
}
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.draws]


def levels(schedule, t):
    return tuple(level.item() for level in schedule(t))


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def last(steps):
    *_, step = steps
    return step


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_samplers_end_in_the_last_estimate_however_few_the_steps(name, sampler):
    """At t = 0 there is no noise; with one step from t = 1 the result is the estimate made there."""
    schedule = SCHEDULES[name]
    z = initial_noise((3, 2, 2, 2), seeds(3), schedule).double()
    for steps in (1, 2, 5, 13):
        walked = list(SAMPLERS[sampler].run(denoiser_of(TWO, schedule), z, times(schedule, steps), schedule, seeds(3)))
        assert walked[-1].t == 0 and all(step.z.isfinite().all() for step in walked)
        assert [step.index for step in walked] == list(range(len(walked)))
        torch.testing.assert_close(walked[-1].z, walked[-1].z_0, rtol=1e-9, atol=1e-9)
        if sampler != "ode":  # which takes steps of its own
            assert [step.t for step in walked] == times(schedule, steps)[1:].tolist()
        if steps == 1 and sampler != "ode":
            torch.testing.assert_close(walked[0].z_0, denoiser_of(TWO, schedule)(z, 1.0))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ode_is_solved_alike_however_few_the_steps_that_are_asked_for(name):
    schedule = SCHEDULES[name]
    z = initial_noise((1, 9), seeds(1), schedule).double()
    ends = [
        last(SAMPLERS["ode"].run(denoiser_of(TWO, schedule), z, times(schedule, steps), schedule, [])).z
        for steps in (1, 7)
    ]
    assert torch.equal(*ends)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_samplers_walk_numbers_of_steps_that_do_not_divide_the_levels_and_all_of_them(name, sampler):
    """In float32, too, and for any context: here always the same."""
    schedule = SCHEDULES[name]
    for steps, dtype in ((7, torch.float32), (30, torch.float64), *ALL_LEVELS.get(name, ())):
        z = initial_noise((1, 3), seeds(1), schedule).to(dtype)
        end = last(
            SAMPLERS[sampler].run(lambda z, t: torch.full_like(z, 0.3), z, times(schedule, steps), schedule, seeds(1))
        )
        assert end.t == 0 and end.z.dtype == dtype
        torch.testing.assert_close(end.z, torch.full_like(z, 0.3), rtol=0, atol=1e-3)


def test_ddim_is_euler_for_rectified_flow():
    """z + (s - t) v with v = noise - z_0, the step of Liu et al. 2022."""
    schedule, denoise = SCHEDULES["flow"], denoiser_of(TWO, SCHEDULES["flow"])
    z = initial_noise((4, 1, 3, 3), seeds(4), schedule).double()
    walk = times(schedule, 13)
    by_hand = z
    walked = zip(
        ddim(denoise, z, walk, schedule, []), SAMPLERS["euler"].run(denoise, z, walk, schedule, []), strict=True
    )
    for i, (one, other) in enumerate(walked):
        t, s = walk[i].item(), walk[i + 1].item()
        by_hand = by_hand + (s - t) * (by_hand - denoise(by_hand, t)) / t
        torch.testing.assert_close(one.z, by_hand, rtol=0, atol=1e-12)
        torch.testing.assert_close(other.z, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_along_straight_lines_is_ddim_for_every_schedule(name):
    schedule, denoise = SCHEDULES[name], denoiser_of(TWO, SCHEDULES[name])
    z = initial_noise((4, 1, 3, 3), seeds(4), schedule).double()
    ends = [last(SAMPLERS[s].run(denoise, z, times(schedule, 20), schedule, [])).z for s in ("ddim", "euler")]
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
    schedule, options = SCHEDULES[name], {"eta": 0.7} if "eta" in SAMPLERS[sampler].options else {}

    def sample(which):
        generators = [torch.Generator().manual_seed(100 + i) for i in which]
        z = initial_noise((len(which), 2, 4, 4), generators, schedule)
        walk = times(schedule, 9)
        return last(SAMPLERS[sampler].run(denoiser_of(TWO, schedule), z, walk, schedule, generators, **options)).z

    together = sample([0, 1, 2, 3])
    bound = 5e-4 if sampler == "ode" else 0  # ode: pictures of one batch share their steps
    for i in range(4):
        torch.testing.assert_close(sample([i])[0], together[i], rtol=0, atol=bound)
    torch.testing.assert_close(sample([3, 1]), together[[3, 1]], rtol=0, atol=bound)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_do_not_draw(sampler):
    generators = seeds(2)
    before = [g.get_state() for g in generators]
    schedule = SCHEDULES["scaled_linear"]
    last(SAMPLERS[sampler].run(denoiser_of(TWO, schedule), torch.zeros(2, 3), times(schedule, 5), schedule, generators))
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samplers_call_the_denoiser_as_often_as_listed_and_keep_the_dtype(sampler, dtype):
    schedule, called = SCHEDULES["scaled_linear"], []

    def denoise(z, t):
        called.append(t)
        assert z.dtype == dtype and isinstance(t, float) and t > 0
        return denoiser_of(TWO, schedule)(z, t)

    z = torch.ones(2, 3, dtype=dtype)
    assert last(SAMPLERS[sampler].run(denoise, z, times(schedule, 10), schedule, seeds(2))).z.dtype == dtype
    if sampler != "ode":
        assert len(called) == eval(SAMPLERS[sampler].calls.replace(" S", " * S"), {"S": 10})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_stops_where_its_caller_stops(sampler):
    schedule, called = SCHEDULES["scaled_linear"], []
    walk = times(schedule, 10)
    steps = SAMPLERS[sampler].run(lambda z, t: called.append(t) or z, torch.ones(1, 3), walk, schedule, seeds(1))
    next(steps)
    next(steps)
    steps.close()
    assert len(called) <= {"langevin": 10, "ode": 25}.get(sampler, 4)


def test_initial_noise_has_the_variance_of_noised_unit_latents_or_of_noise_alone():
    at = SCHEDULES["scaled_linear"], 0.2
    z = initial_noise((1, 100_000), seeds(1), *at, noise_only=True)
    torch.testing.assert_close(z, initial_noise((1, 100_000), seeds(1), *at) * at[0](0.2)[1].float())
    for name, std in [("scaled_linear", 1), ("zero_terminal", 1), ("flow", 1), ("ve", (1 + 50**2) ** 0.5)]:
        z = initial_noise((1, 100_000), seeds(1), SCHEDULES[name])
        assert z.std().item() == pytest.approx(std, rel=0.01) and z.dtype == torch.float32


def test_wrong_arguments_raise_a_message_that_names_the_error():
    schedule = SCHEDULES["flow"]
    with pytest.raises(ValueError, match="3 images need as many generators, not 2"):
        initial_noise((3, 4), seeds(2), schedule)
    with pytest.raises(ValueError, match="eta 1.5"):
        next(ddim(lambda z, t: z, torch.ones(1, 1), times(schedule, 2), schedule, seeds(1), eta=1.5))
    for walk in ([1.0], [0.5, 0.5, 0.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="each below the one before"):
            next(ddim(lambda z, t: z, torch.ones(1, 1), torch.tensor(walk), schedule, seeds(1)))


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_walk_may_end_at_the_first_noise_level_and_stay_there(sampler, spacing):
    """As Stable Diffusion's DDIM and PNDM do; where the last step begins there already, it changes nothing."""
    schedule = SCHEDULES["scaled_linear"]
    walk = times(schedule, 6, spacing, replace(SAMPLERS[sampler].time_defaults, ends_clean=False), offset=0)
    z = initial_noise((2, 3), seeds(2), schedule).double()
    *_, before, end = SAMPLERS[sampler].run(denoiser_of(TWO, schedule), z, walk, schedule, seeds(2))
    assert end.t == 0.001 and end.z.isfinite().all()
    if walk[-2] == walk[-1] and sampler != "ode":  # which counts no such step
        assert before.t == pytest.approx(end.t)
        torch.testing.assert_close(end.z, before.z)


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "cosine", "ve", "flow"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_walks_every_spacing(name, spacing):
    for sampler in SAMPLERS.values():
        for steps in (1, 2, 7):
            walk = times(SCHEDULES[name], steps, spacing, sampler.time_defaults)
            z = initial_noise((1, 50), seeds(1), SCHEDULES[name], walk[0].item()).double()
            end = last(sampler.run(denoiser_of(GAUSSIAN, SCHEDULES[name]), z, walk, SCHEDULES[name], seeds(1)))
            assert end.z.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_hold_no_more_than_their_order_needs(sampler):
    """Tensors like z that are alive while the network is called, except z itself and its previous inputs."""
    schedule, counts = SCHEDULES["scaled_linear"], []
    shape = (1, 3, 1, 7)

    def alive():
        return sum(type(thing) is torch.Tensor and thing.shape == shape for thing in gc.get_objects())

    def denoise(z, t):
        if 0.2 < t < 0.5:  # looking through all objects takes long, and by then the past is full
            counts.append(alive() - before)
        return 0.3 * z

    gc.collect()
    before = alive()
    for step in SAMPLERS[sampler].run(denoise, torch.ones(shape), times(schedule, 8), schedule, seeds(1)):
        del step
    assert max(counts) <= HELD[sampler]


def test_no_steps_are_an_error_of_one_line():
    with pytest.raises(ValueError, match="^0 steps is not between 1 and 1000[^\n]*$"):
        times(SCHEDULES["scaled_linear"], 0)
