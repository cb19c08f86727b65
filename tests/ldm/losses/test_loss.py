"""ldm/losses/diffusion_loss.py: what is compared, and how much each noise level counts."""

import pytest
import torch

from ldm.denoising.denoiser import Denoiser
from ldm.denoising.prediction import NOISE_ALONE, PREDICTIONS
from ldm.losses.diffusion_loss import WEIGHTINGS, diffusion_loss, loss_weight
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from tests.helpers.proofs.oracles import SCHEDULES

GAMMA = 5.0
T = torch.tensor([0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999], dtype=torch.float64)
PAIRS = [
    (name, prediction)
    for name in ["scaled_linear", "ve", "sub_vp", "edm", "flow", "zero_terminal"]
    for prediction in PREDICTIONS
    if not (prediction in NOISE_ALONE and SCHEDULES[name].ends_in_pure_noise)
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


def errors_of_noise(denoiser, z_0, noise, t):
    """The squared error [B] of the noise that an estimate of z_0 implies."""
    alpha, sigma = (level[:, None, None, None] for level in denoiser.schedule(t))
    z_t = alpha * z_0 + sigma * noise
    return ((z_t - alpha * denoiser(z_t, t)) / sigma - noise).square().mean((1, 2, 3))


def ratio_to_the_level_before(schedule, t):
    """snr(s) / snr(t) - 1, for the first level that of the second, times T."""
    t = t.clamp(min=0.002)
    return (schedule.snr(t - 0.001) / schedule.snr(t) - 1) * 1000


PAPERS = {  # weights of the squared error of noise, on discrete and on continuous schedules
    "min_snr": lambda schedule, t: schedule.snr(t).clamp(max=5) / schedule.snr(t),
    "vlb": lambda schedule, t: (ratio_to_the_level_before if schedule.discrete else slope)(schedule, t) / 2,
    "p2": lambda schedule, t: 1 / (1 + schedule.snr(t)),
    "edm": lambda schedule, t: 1 / schedule.snr(t) + 1,  # (sigma^2 + 1) / sigma^2 on z_0, as 1 / c_out^2
    "sigmoid": lambda schedule, t: PAPERS["vlb"](schedule, t) * torch.sigmoid(-schedule.snr(t).log()),
}


def slope(schedule, t):
    h = 1e-7
    return (schedule.snr(t - h).log() - schedule.snr(t + h).log()) / (2 * h)


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
@pytest.mark.parametrize("weighting", PAPERS)
def test_weights_are_those_of_the_papers_on_noise_for_every_prediction(weighting, name, prediction):
    z_0, noise = draw()
    denoiser, t = Denoiser(guess, SCHEDULES[name], prediction), T.clamp(min=0.001 + 1e-6 * (name in ("sub_vp", "edm")))
    loss = diffusion_loss(denoiser, z_0, None, t, noise, weighting)
    expected = PAPERS[weighting](SCHEDULES[name], t) * errors_of_noise(denoiser, z_0, noise, t)
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_vlb_is_the_papers_weight_with_the_variance_of_the_posterior(name):
    """Ho et al. 2020, eq. 12: beta^2 / (2 sigma^2 alpha_t (1 - alpha_bar)), sigma^2 the posterior's, times T terms."""
    schedule, t = SCHEDULES[name], torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha_bar = schedule(t)[0] ** 2
    kept = alpha_bar[1:] / alpha_bar[:-1]  # the paper's alpha_t
    beta, before = 1 - kept, 1 - alpha_bar[:-1]
    variance = before / (1 - alpha_bar[1:]) * beta
    paper = beta**2 / (2 * variance * kept * (1 - alpha_bar[1:])) * 1000
    weight = loss_weight(Denoiser(guess, schedule, "noise"), t, "vlb")
    torch.testing.assert_close(weight[1:], paper, rtol=1e-6, atol=0)
    assert weight[0].item() == pytest.approx(weight[1].item(), rel=1e-9)  # instead of infinity
    torch.testing.assert_close(loss_weight(Denoiser(guess, schedule, "noise"), t.float(), "vlb"), weight)


def test_edm_weighs_the_output_of_edm_prediction_by_one():
    for name in ("edm", "flow", "scaled_linear", "sub_vp"):
        weight = loss_weight(Denoiser(guess, SCHEDULES[name], "edm"), T, "edm")
        torch.testing.assert_close(weight, torch.ones(7, dtype=torch.float64), rtol=1e-9, atol=0)


def test_gamma_is_the_papers_constant_of_each_weighting():
    def weight(weighting, gamma):
        return loss_weight(Denoiser(guess, SCHEDULES["linear_continuous"], "noise"), T, weighting, gamma)

    snr = SCHEDULES["linear_continuous"].snr(T)
    torch.testing.assert_close(weight("p2", 0.5), (1 + snr) ** -0.5)
    torch.testing.assert_close(weight("min_snr", 2.0), (2 / snr).clamp(max=1))
    torch.testing.assert_close(weight("sigmoid", -1.5), weight("vlb", None) * torch.sigmoid(-1.5 - snr.log()))
    for weighting, gamma in (("min_snr", 5), ("p2", 1), ("sigmoid", 0)):
        assert torch.equal(weight(weighting, None), weight(weighting, float(gamma)))


@pytest.mark.parametrize("weighting", ["vlb", "sigmoid"])
@pytest.mark.parametrize("name", ["linear_continuous", "sub_vp", "linear", "scaled_linear"])
def test_schedules_that_cover_the_same_noise_have_the_same_expected_loss(name, weighting):
    """Kingma et al. 2021, section 5.1: only the ends of the range of log(snr) count, not the way between them."""
    schedule, u = SCHEDULES[name], (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    low, high = ((1 / schedule.snr(t).sqrt()).item() for t in (0.002, 1.0))  # the first level is weighed otherwise

    def expected(schedule):
        denoiser, t = Denoiser(guess, schedule, "clean"), schedule.quantize(u)
        ratio = 1 / schedule.snr(t).sqrt()
        error = torch.where(ratio > low * (1 + 1e-9), ratio**4 / (1 + ratio**2) ** 2.5, 0.0)  # of some z_0
        share = 1 if schedule.discrete else 0.999  # of time that is drawn from
        return (loss_weight(denoiser, t, weighting) * error).mean().item() * share

    for other in ("edm", "ve"):
        config = ScheduleConfig(name=other, sigma_min=low, sigma_max=high, continuous=True)
        expected_value = expected(make_schedule(config))
        assert expected(schedule) == pytest.approx(expected_value, rel=0.015 if schedule.discrete else 1e-4)


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


def test_the_network_gets_the_context_and_the_loss_is_float32_from_bfloat16_outputs():
    z_0, noise = (x.float() for x in draw())
    condition = []

    def network(z_in, timestep, context):
        condition.append(context)
        return z_in.bfloat16()

    loss = diffusion_loss(Denoiser(network, SCHEDULES["scaled_linear"], "noise"), z_0, "words", T.float(), noise)
    assert condition == ["words"] and loss.dtype == torch.float32


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
    pairs += [("edm", "edm"), ("sub_vp", "score")]
    for name, prediction in pairs:
        assert loss_weight(Denoiser(guess, SCHEDULES[name], prediction), ends, weighting).isfinite().all()


def test_a_wrong_weighting_raises_a_message_that_names_the_error():
    z_0, noise = draw()
    denoiser = Denoiser(guess, SCHEDULES["scaled_linear"], "noise")
    with pytest.raises(ValueError, match="unknown loss weighting 'snr'; use one of simple, min_snr"):
        diffusion_loss(denoiser, z_0, None, T, noise, weighting="snr")
    with pytest.raises(ValueError, match="gamma 0 must be a positive number; 5 is usual"):
        diffusion_loss(denoiser, z_0, None, T, noise, weighting="min_snr", gamma=0)
    with pytest.raises(ValueError, match="gamma inf must be a finite number; 0 is usual"):
        loss_weight(denoiser, T, "sigmoid", float("inf"))
