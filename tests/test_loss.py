"""ldm/loss.py: what is compared, and how much each noise level counts."""

import pytest
import torch
from oracles import SCHEDULES

from ldm.denoiser import Denoiser
from ldm.loss import WEIGHTINGS, diffusion_loss, loss_weight
from ldm.prediction import PREDICTIONS

GAMMA = 5.0
T = torch.tensor([0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999], dtype=torch.float64)
PAIRS = [
    (name, prediction)
    for name in ["scaled_linear", "ve", "cosine", "flow", "zero_terminal"]
    for prediction in PREDICTIONS
    if not (prediction == "noise" and SCHEDULES[name].ends_in_pure_noise)
]


def draw(count=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2)]


def guess(z_in, timestep, context):
    return torch.tanh(1.3 * z_in)


@pytest.mark.parametrize(
    ("name", "prediction", "expected"),
    [
        ("scaled_linear", "noise", lambda snr: snr.clamp(max=GAMMA) / snr),
        ("scaled_linear", "clean", lambda snr: snr.clamp(max=GAMMA)),
        ("zero_terminal", "velocity", lambda snr: snr.clamp(max=GAMMA) / (snr + 1)),
        ("ve", "velocity", lambda snr: snr.clamp(max=GAMMA) / (snr + 1)),
        ("ve", "noise", lambda snr: snr.clamp(max=GAMMA) / snr),
        ("flow", "flow", lambda snr: snr.clamp(max=GAMMA) / (snr.sqrt() + 1) ** 2),
        ("flow", "velocity", lambda snr: snr.clamp(max=GAMMA) * (snr.sqrt() + 1) ** 2 / (snr + 1) ** 2),
    ],
)
def test_min_snr_weights_are_those_the_prediction_implies(name, prediction, expected):
    schedule = SCHEDULES[name]
    weight = loss_weight(Denoiser(guess, schedule, prediction), T, "min_snr", GAMMA)
    torch.testing.assert_close(weight, expected(schedule.snr(T)), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_min_snr_is_the_weighted_error_of_z_0_for_every_prediction(name, prediction):
    z_0, noise = draw()
    denoiser = Denoiser(guess, SCHEDULES[name], prediction)
    loss = diffusion_loss(denoiser, z_0, None, T, noise, weighting="min_snr", gamma=GAMMA)
    error = (denoiser(denoiser.add_noise(z_0, noise, T), T) - z_0).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, SCHEDULES[name].snr(T).clamp(max=GAMMA) * error, rtol=1e-7, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_simple_loss_is_the_plain_error_of_the_output(prediction):
    z_0, noise = draw()
    denoiser = Denoiser(guess, SCHEDULES["scaled_linear"], prediction)
    output = denoiser.output(denoiser.add_noise(z_0, noise, T), T)
    expected = (output - denoiser.target(z_0, noise, T)).square().mean((1, 2, 3))
    torch.testing.assert_close(diffusion_loss(denoiser, z_0, None, T, noise), expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_each_image_counts_alone(weighting):
    z_0, noise = draw()
    denoiser = Denoiser(guess, SCHEDULES["scaled_linear"], "velocity")
    together = diffusion_loss(denoiser, z_0, None, T, noise, weighting)
    assert together.shape == (7,)
    for i in range(7):
        j = slice(i, i + 1)
        assert torch.equal(diffusion_loss(denoiser, z_0[j], None, T[j], noise[j], weighting), together[j])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_network_that_outputs_the_target_has_no_loss(weighting):
    z_0, noise = draw()
    denoiser = Denoiser(lambda *_: denoiser.target(z_0, noise, T), SCHEDULES["ve"], "velocity")
    assert diffusion_loss(denoiser, z_0, None, T, noise, weighting).abs().max() == 0


def test_the_network_is_told_the_context_and_the_loss_is_float32_from_bfloat16_outputs():
    z_0, noise = (x.float() for x in draw())
    told = []

    def network(z_in, timestep, context):
        told.append(context)
        return z_in.bfloat16()

    loss = diffusion_loss(Denoiser(network, SCHEDULES["scaled_linear"], "noise"), z_0, "words", T.float(), noise)
    assert told == ["words"] and loss.dtype == torch.float32


def test_the_gradient_reaches_the_network():
    z_0, noise = (x.float() for x in draw())
    weight = torch.nn.Parameter(torch.tensor(0.5))
    denoiser = Denoiser(lambda z_in, *_: weight * z_in, SCHEDULES["scaled_linear"], "noise")
    diffusion_loss(denoiser, z_0, None, T.float(), noise, "min_snr").mean().backward()
    assert weight.grad.isfinite() and weight.grad != 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_at_both_ends_of_time(weighting):
    ends = torch.tensor([0.001, 1.0])
    pairs = [("scaled_linear", "noise"), ("zero_terminal", "velocity"), ("flow", "flow"), ("ve", "clean")]
    for name, prediction in pairs:
        assert loss_weight(Denoiser(guess, SCHEDULES[name], prediction), ends, weighting).isfinite().all()


def test_a_wrong_weighting_says_what_is_wrong():
    z_0, noise = draw()
    denoiser = Denoiser(guess, SCHEDULES["scaled_linear"], "noise")
    with pytest.raises(ValueError, match="unknown loss weighting 'snr'; use one of simple, min_snr"):
        diffusion_loss(denoiser, z_0, None, T, noise, weighting="snr")
    with pytest.raises(ValueError, match="gamma 0 must be"):
        diffusion_loss(denoiser, z_0, None, T, noise, weighting="min_snr", gamma=0)
