"""ldm/samplers.py against exact solutions and against each other. For diffusers see test_sampler_interop.py."""

import math
import weakref

import pytest
import torch
from oracles import GAUSSIAN, SCHEDULES, TWO, denoiser_of

from ldm.multistep import dpmpp_2m, pndm, unipc
from ldm.onestep import ddim, ddpm
from ldm.samplers import SAMPLERS
from ldm.times import SPACINGS, times
from ldm.walk import initial_noise

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.draws]


def levels(schedule, t):
    return tuple(level.item() for level in schedule(t))


def walk_from(start, stop, steps):
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def last(steps):
    *_, step = steps
    return step


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("data", [GAUSSIAN, TWO], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "zero_terminal", "ve", "flow"])
def test_deterministic_samplers_converge_to_the_probability_flow_at_their_order(name, data, sampler):
    """From t = 1 even where no signal is left there. The logarithm of dpmpp_2m and unipc makes their constants large
    there and at t = 0 (on flow 2.9, 3.2, 3.4, ... for 4), so there they start and stop inside. pndm is better than its
    order on flow, where it is a plain Adams-Bashforth method."""
    schedule, order = SCHEDULES[name], SAMPLERS[sampler].order
    inside = name in ("cosine", "zero_terminal", "flow") and sampler in ("dpmpp_2m", "unipc")
    start, stop = (0.9 if inside else 1.0), (0.0 if name == "flow" and not inside else 0.2)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * math.hypot(*levels(schedule, start))
    exact = data.flow(z, levels(schedule, start), levels(schedule, stop))
    errors = []
    for steps in (160, 320) if inside else (80, 160):
        end = last(
            SAMPLERS[sampler].run(denoiser_of(data, schedule), z, walk_from(start, stop, steps), schedule, seeds(9))
        )
        assert end.t == stop
        errors.append((end.z - exact).abs().mean().item())
    gain = errors[0] / errors[1]
    assert gain == pytest.approx(2**order, rel=0.2) or (name, sampler) == ("flow", "pndm") and gain > 2**order
    assert errors[1] < (0.02 if order == 1 else 5e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samplers_end_in_the_last_estimate_however_few_the_steps(name, sampler, steps):
    """At t = 0 there is no noise; with one step from t = 1 the result is the estimate made there."""
    schedule = SCHEDULES[name]
    z = initial_noise((3, 2, 4, 4), seeds(3), schedule).double()
    walked = list(SAMPLERS[sampler].run(denoiser_of(TWO, schedule), z, times(schedule, steps), schedule, seeds(3)))
    assert [step.index for step in walked] == list(range(steps)) and walked[-1].t == 0
    assert [step.t for step in walked] == times(schedule, steps)[1:].tolist()
    assert all(step.z.isfinite().all() for step in walked)
    torch.testing.assert_close(walked[-1].z, walked[-1].z_0, rtol=1e-9, atol=1e-9)
    if sampler != "pndm" or steps == 1:  # which estimates from both ends of its first step
        torch.testing.assert_close(walked[0].z_0, denoiser_of(TWO, schedule)(z, 1.0))


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
    for i in range(4):
        assert torch.equal(sample([i])[0], together[i])
    assert torch.equal(sample([3, 1]), together[[3, 1]])


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_deterministic_samplers_do_not_draw(sampler):
    generators = seeds(2)
    before = [g.get_state() for g in generators]
    schedule = SCHEDULES["scaled_linear"]
    last(SAMPLERS[sampler].run(denoiser_of(TWO, schedule), torch.zeros(2, 3), times(schedule, 5), schedule, generators))
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samplers_call_the_denoiser_as_often_as_they_say_and_keep_the_dtype(sampler, dtype):
    schedule, called = SCHEDULES["scaled_linear"], []

    def denoise(z, t):
        called.append(t)
        assert z.dtype == dtype and isinstance(t, float) and t > 0
        return denoiser_of(TWO, schedule)(z, t)

    z = torch.ones(2, 3, dtype=dtype)
    assert last(SAMPLERS[sampler].run(denoise, z, times(schedule, 10), schedule, seeds(2))).z.dtype == dtype
    assert len(called) == eval(SAMPLERS[sampler].calls.replace("2 S", "2 * S"), {"S": 10})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_stops_where_its_caller_stops(sampler):
    schedule, called = SCHEDULES["scaled_linear"], []
    walk = times(schedule, 10)
    steps = SAMPLERS[sampler].run(lambda z, t: called.append(t) or z, torch.ones(1, 3), walk, schedule, seeds(1))
    next(steps)
    next(steps)
    steps.close()
    assert len(called) <= 4


def test_initial_noise_has_the_variance_of_noised_unit_latents_or_of_noise_alone():
    at = SCHEDULES["scaled_linear"], 0.2
    z = initial_noise((1, 100_000), seeds(1), *at, noise_only=True)
    torch.testing.assert_close(z, initial_noise((1, 100_000), seeds(1), *at) * at[0](0.2)[1].float())
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


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_walk_may_end_at_the_first_noise_level_and_stay_there(sampler, spacing):
    """As Stable Diffusion's DDIM and PNDM do; where the last step begins there already, it changes nothing."""
    schedule = SCHEDULES["scaled_linear"]
    walk = times(schedule, 6, spacing, SAMPLERS[sampler].habit, offset=0, ends_clean=False)
    z = initial_noise((2, 3), seeds(2), schedule).double()
    *_, before, end = SAMPLERS[sampler].run(denoiser_of(TWO, schedule), z, walk, schedule, seeds(2))
    assert end.t == 0.001 and end.z.isfinite().all()
    if spacing != "trailing":
        assert before.t == pytest.approx(end.t)
        torch.testing.assert_close(end.z, before.z)


def test_pndm_is_of_second_order_for_what_has_one_meaning_at_all_times_and_of_first_for_velocity():
    """Velocity is -sigma z_0 + alpha noise: what it says at one time is no velocity at another."""
    schedule, z = SCHEDULES["scaled_linear"], torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = TWO.flow(z, levels(schedule, 1.0), levels(schedule, 0.2))
    for averaged, order in {"noise": 2, "clean": 2, "flow": 2, "velocity": 1}.items():
        ends = [
            last(pndm(denoiser_of(TWO, schedule), z, walk_from(1, 0.2, steps), schedule, [], averaged=averaged)).z
            for steps in (80, 160)
        ]
        first, second = ((end - exact).abs().mean().item() for end in ends)
        assert first / second == pytest.approx(2**order, rel=0.2), averaged


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_of_solvers_is_ddim(name):
    schedule, denoise = SCHEDULES[name], denoiser_of(TWO, SCHEDULES[name])
    z, walk = initial_noise((2, 5), seeds(2), schedule).double(), times(schedule, 12)
    plain = next(ddim(denoise, z, walk, schedule, []))
    for solver in (dpmpp_2m, unipc):
        torch.testing.assert_close(next(solver(denoise, z, walk, schedule, [])).z, plain.z, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "cosine", "ve", "flow"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_walks_every_spacing(name, spacing):
    for sampler in SAMPLERS.values():
        for steps in (1, 2, 7):
            walk = times(SCHEDULES[name], steps, spacing, sampler.habit)
            z = initial_noise((1, 50), seeds(1), SCHEDULES[name], walk[0].item()).double()
            end = last(sampler.run(denoiser_of(GAUSSIAN, SCHEDULES[name]), z, walk, SCHEDULES[name], seeds(1)))
            assert end.z.isfinite().all()


def test_samplers_hold_no_more_estimates_than_their_order_needs():
    """Tensors made by the network that are alive while it is called again."""
    schedule, alive = SCHEDULES["scaled_linear"], []

    def denoise(z, t):
        z_0 = denoiser_of(TWO, schedule)(z, t)
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(z_0))
        return z_0

    for name, most in {"ddim": 1, "ddpm": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3, "pndm": 2}.items():
        counts, alive[:] = [], []
        for step in SAMPLERS[name].run(denoise, torch.ones(1, 3), times(schedule, 12), schedule, seeds(1)):
            del step
        assert max(counts) <= most, name
