"""ldm/denoising/denoiser.py: every schedule and prediction gives the same estimate from the same network meaning."""

import pytest
import torch

from ldm.denoising.denoiser import Denoiser
from ldm.denoising.prediction import NOISE_ALONE, PREDICTIONS
from ldm.samplers.spacing import times
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from tests.helpers.proofs.oracles import SCHEDULES, TWO, perfect_network

PAIRS = [
    (name, prediction)
    for name in SCHEDULES
    for prediction in PREDICTIONS
    if not (prediction in NOISE_ALONE and SCHEDULES[name].ends_in_pure_noise)
]


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
@pytest.mark.parametrize("t", [0.001, 0.02, 0.3, 0.5005, 0.7])
def test_every_schedule_and_prediction_gives_the_same_estimate(name, prediction, t):
    schedule = SCHEDULES[name]
    alpha, sigma = (level.item() for level in schedule(t))
    z_0 = TWO.sample(4 * 2 * 4 * 4, torch.Generator().manual_seed(1)).reshape(4, 2, 4, 4)
    noise = torch.randn(z_0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z_t = alpha * z_0 + sigma * noise
    exact = TWO.denoise(z_t, alpha, sigma)
    denoiser = Denoiser(perfect_network(TWO, schedule, prediction, t), schedule, prediction)
    torch.testing.assert_close(denoiser(z_t, t), exact, rtol=0, atol=1e-12 * max(1, sigma / alpha))
    single = denoiser(z_t.float(), t)
    assert single.dtype == torch.float32
    # Rounding z_t to float32 moves z_0 by an ulp of z_t / alpha: below 1e-5 until sigma / alpha is near 100.
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5 * max(1, sigma / alpha / 10))


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_the_output_that_is_the_target_denoises_to_z_0(name, prediction):
    generator = torch.Generator().manual_seed(0)
    z_0, noise = (torch.randn(6, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.tensor([0.001, 0.01, 0.1, 0.4, 0.8, 0.99], dtype=torch.float64)
    denoiser = Denoiser(lambda z_in, timestep, context: denoiser.target(z_0, noise, t), SCHEDULES[name], prediction)
    torch.testing.assert_close(denoiser(denoiser.add_noise(z_0, noise, t), t), z_0, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["ve", "ve_large", "edm", "scaled_linear", "zero_terminal"])
def test_the_network_sees_and_is_asked_for_unit_variance(name):
    generator = torch.Generator().manual_seed(0)
    z_0, noise = (torch.randn(9, 40000, generator=generator) for _ in range(2))
    t = torch.linspace(0.001, 1, 9)
    denoiser = Denoiser(lambda z_in, timestep, context: z_in, SCHEDULES[name], "velocity")
    z_in = denoiser.output(denoiser.add_noise(z_0, noise, t), t)
    torch.testing.assert_close(z_in.var(1), torch.ones(9), rtol=0.04, atol=0)
    torch.testing.assert_close(denoiser.target(z_0, noise, t).var(1), torch.ones(9), rtol=0.04, atol=0)


def draw_large(sigma):
    return sigma * torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network_of_two(z_in, timestep, context):
    return torch.tanh(z_in) * (1 + timestep.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("name", ["ve", "edm"])
@pytest.mark.parametrize("t", [0.1, 0.6, 1.0])
def test_edm_and_negative_velocity_on_exploding_variance_are_karras_preconditioning(name, t):
    """Karras et al. 2022, table 1 with sigma_data = 1."""
    schedule = SCHEDULES[name]
    sigma, condition = schedule(t)[1].item(), schedule.timestep(t).expand(2)
    z_t = draw_large(sigma)
    c_skip, c_out, c_in = 1 / (1 + sigma**2), sigma / (1 + sigma**2) ** 0.5, 1 / (1 + sigma**2) ** 0.5
    paper = c_skip * z_t + c_out * network_of_two(c_in * z_t, condition, None)
    torch.testing.assert_close(Denoiser(network_of_two, schedule, "edm")(z_t, t), paper)
    negative = lambda *condition: -network_of_two(*condition)  # noqa: E731
    torch.testing.assert_close(Denoiser(negative, schedule, "velocity")(z_t, t), paper)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_a_model_of_pixels_with_sigma_data_one_half_is_the_same_with_pixels_and_sigmas_doubled(sigma):
    """Karras et al. 2022, table 1 in its own coordinates: x, sigma and D of pictures, sigma_data = 0.5."""
    data = 0.5
    doubled = make_schedule(ScheduleConfig(name="edm", sigma_min=2 * 0.002, sigma_max=2 * 80.0))
    t = doubled.time(2 * sigma).item()
    condition = doubled.timestep(t).expand(2)
    x = draw_large((sigma**2 + data**2) ** 0.5)
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
    c_in = 1 / (sigma**2 + data**2) ** 0.5
    paper = c_skip * x + c_out * network_of_two(c_in * x, condition, None)
    torch.testing.assert_close(Denoiser(network_of_two, doubled, "edm")(2 * x, t) / 2, paper)
    c_noise = [(s.log() / 4).item() for s in (doubled(t)[1] / 2, torch.tensor(0.002), torch.tensor(80.0))]
    from_paper = 1000 * (c_noise[0] - c_noise[1]) / (c_noise[2] - c_noise[1])
    assert condition[0].item() == pytest.approx(from_paper, rel=1e-6, abs=1e-3)


def test_one_time_for_all_is_each_images_time():
    seen = []

    def network(z_in, timestep, context):
        seen.append((timestep, context))
        return z_in.sin() * timestep.view(-1, 1, 1, 1) / 1000

    z_t = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(network, SCHEDULES["scaled_linear"], "velocity")
    answers = [denoiser(z_t, t, "context") for t in (0.5, torch.tensor(0.5), torch.full((3,), 0.5))]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert all(t.tolist() == [499.0] * 3 and t.dtype == torch.float32 and c == "context" for t, c in seen)


@pytest.mark.parametrize("name", ["flow", "zero_terminal"])
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_noise_and_score_on_a_schedule_that_ends_in_pure_noise_raise_with_the_reason(name, prediction):
    with pytest.raises(ValueError, match=f"{prediction} prediction is undefined .* no signal left at t = 1"):
        Denoiser(None, SCHEDULES[name], prediction)


@pytest.mark.parametrize("prediction", ["clean", "velocity", "flow", "edm"])
@pytest.mark.parametrize("name", ["flow", "zero_terminal"])
def test_pure_noise_denoises_to_the_output_of_the_network(name, prediction):
    z_0 = torch.full((2, 1, 2, 2), 0.25, dtype=torch.float64)
    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(lambda z_in, timestep, context: denoiser.target(z_0, z_in, 1.0), SCHEDULES[name], prediction)
    torch.testing.assert_close(denoiser(noise, 1.0), z_0)


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
@pytest.mark.parametrize("at_levels", [True, False])
def test_a_prepared_denoiser_returns_the_same_bits(name, prediction, at_levels):
    network = lambda z_in, timestep, context: torch.tanh(z_in) + timestep.view(-1, 1, 1, 1) / 1000  # noqa: E731
    denoiser = Denoiser(network, SCHEDULES[name], prediction, at_levels)
    visited = times(SCHEDULES[name], 7, "karras")
    prepared = denoiser.prepared(visited)
    for dtype in (torch.float32, torch.float64):
        z_t = torch.randn(2, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
        for t in [*visited.tolist(), 0.123]:
            assert torch.equal(prepared(z_t, t), denoiser(z_t, t))
