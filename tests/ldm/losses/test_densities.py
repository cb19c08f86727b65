"""ldm/losses/time_density.py: times come as often as the papers say, and importance changes no mean."""

import math

import pytest
import torch

from ldm.losses.time_density import DENSITIES, DensityConfig, Importance, make_density
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from tests.helpers.proofs.oracles import SCHEDULES

COUNT = 100_000
U = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
FIXED = [name for name in DENSITIES if name != "importance"]


def draw(schedule, **config):
    return make_density(DensityConfig(**config), SCHEDULES[schedule]).draw(U)


def distance(samples, x, pdf):
    """Kolmogorov and Smirnov's: the largest distance of the samples' share below to the integral of pdf(x) up to x."""
    cdf = torch.cumulative_trapezoid(pdf, x)
    return (torch.searchsorted(samples.sort().values, x[1:]) / len(samples) - cdf).abs().max().item()


def share_of_range(t):
    """t in [1/T, 1) as a share of that range."""
    return (t - 0.001) / 0.999


@pytest.mark.parametrize(("mean", "std"), [(None, None), (-0.5, 0.6), (1.0, 1.5)])
def test_logit_normal_times_have_the_density_of_the_paper(mean, std):
    """Esser et al. 2024, eq. 19."""
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    m, s = mean or 0.0, std or 1.0
    pdf = torch.exp(-((x.logit() - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi) * x * (1 - x))
    t = draw("flow", name="logit_normal", mean=mean, std=std).t
    assert distance(share_of_range(t), x, pdf) < 1e-4
    assert distance(share_of_range(t), x, torch.ones_like(x)) > 0.05  # what the test would say of another density


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 1.29, 1.75])
def test_mode_times_have_the_density_of_the_paper(scale):
    """Esser et al. 2024, eq. 20 and below: |d/dt f^-1(t)| with f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u)."""
    u = torch.linspace(1, 0, 200_001, dtype=torch.float64)[1:-1]
    x = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    slope = 1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * u))  # -f'(u)
    t = draw("flow", name="mode", scale=scale).t
    assert distance(share_of_range(t), x, 1 / slope) < 2e-3
    middle = ((share_of_range(t) > 0.4) & (share_of_range(t) < 0.6)).double().mean()
    assert (middle > 0.2 + 1e-3) == (scale > 0) and (middle < 0.2 - 1e-3) == (scale < 0)


@pytest.mark.parametrize("name", ["edm", "flow", "linear_continuous", "sub_vp"])
def test_edm_lognormal_noise_is_lognormal_on_every_schedule(name):
    """Karras et al. 2022, table 1: ln(sigma) ~ N(-1.2, 1.2^2), as far as the schedule goes."""
    logs = (1 / SCHEDULES[name].snr(draw(name, name="edm_lognormal").t).sqrt()).log()
    x = torch.linspace(-8, 5, 100_001, dtype=torch.float64)
    pdf = torch.exp(-((x + 1.2) ** 2) / (2 * 1.2**2)) / (1.2 * math.sqrt(2 * math.pi))
    assert distance(logs, x, pdf) < 1e-4 + (logs == logs.min()).double().mean()  # those below the range are at its end
    low = SCHEDULES[name].snr(torch.tensor(0.001, dtype=torch.float64)).sqrt().reciprocal().log()
    assert logs.min() >= low - 1e-9


def test_edm_lognormal_of_a_table_is_at_the_nearest_levels():
    logs = (1 / SCHEDULES["scaled_linear"].snr(draw("scaled_linear", name="edm_lognormal").t).sqrt()).log()
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        normal = -1.2 + 1.2 * torch.special.ndtri(torch.tensor(share)).item()
        assert logs.quantile(share).item() == pytest.approx(normal, abs=0.05)  # levels are up to 0.1 apart there


@pytest.mark.parametrize("density", FIXED)
@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_those_at_which_networks_are_trained(name, density):
    schedule = SCHEDULES[name]
    for u in (U, torch.tensor([0.0, 1 - 2**-24])):
        t, weight = make_density(DensityConfig(name=density), schedule).draw(u)
        assert t.dtype == u.dtype and (weight == 1).all()
        assert t.min() >= 0.001 - 1e-9 and t.max() <= 1
        if schedule.discrete:
            assert torch.equal(schedule.timestep(t), schedule.timestep(t).round())


def test_uniform_times_are_those_of_quantize():
    for name in SCHEDULES:
        u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(make_density(DensityConfig(), SCHEDULES[name]).draw(u).t, SCHEDULES[name].quantize(u))


def taught(schedule, loss_of):
    """Importance that has seen each bin's losses, T KEPT of them and a few more."""
    importance = Importance(schedule)
    for _ in range(12):
        u = (torch.arange(len(importance.counts), dtype=torch.float64) + 0.5) / len(importance.counts)
        u = u if not (importance.counts >= 10).all() else importance._probabilities().cumsum(0) - 1e-9
        importance.learn(u, loss_of(importance.draw(u).t))
    return importance


SMALL = {
    name: make_schedule(ScheduleConfig(name=name, timesteps=50)) for name in ("scaled_linear", "flow", "edm", "cosine")
}


@pytest.mark.parametrize("name", SMALL)
def test_importance_changes_no_mean(name):
    """Nichol & Dhariwal 2021, eq. 18: E_p[L / p] = E[L], here of a function other than the losses it has learnt."""
    importance = taught(SMALL[name], lambda t: 0.1 + t**4)
    t, weight = importance.draw(U)
    for f in (lambda t: torch.ones_like(t), lambda t: t, lambda t: torch.cos(9 * t) + 1.5, lambda t: 1 / t):
        even = f(SMALL[name].quantize(U)).mean().item()
        assert (weight * f(t)).mean().item() == pytest.approx(even, rel=2e-4)
    assert t.mean() > 0.65  # it draws where losses are large


def test_importance_draws_in_proportion_to_the_root_of_mean_squares():
    generator = torch.Generator().manual_seed(0)
    importance = taught(SMALL["scaled_linear"], lambda t: t * torch.randn(50, generator=generator).square())
    counts = SMALL["scaled_linear"].timestep(importance.draw(U).t).long().bincount(minlength=50) / COUNT
    size = importance.losses.square().mean(1).sqrt()
    torch.testing.assert_close(counts.double(), 0.999 * size / size.sum() + 0.001 / 50, rtol=0, atol=2.1 / COUNT)


def test_where_losses_follow_what_was_learnt_their_weighted_variance_vanishes():
    """The reason for it: of losses in proportion to p, L / p is one number."""
    schedule = SMALL["scaled_linear"]
    t, weight = taught(schedule, lambda t: 0.1 + t**4).draw(U)
    weighted, plain = weight * (0.1 + t**4), 0.1 + schedule.quantize(U) ** 4
    assert weighted.std() < 0.01 * plain.std() and weighted.mean().item() == pytest.approx(
        plain.mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_importance_draws_what_uniform_does_until_each_bin_has_ten_losses(name):
    schedule = SCHEDULES[name]
    importance, u = Importance(schedule), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    importance.learn(u, torch.rand(1000, generator=torch.Generator().manual_seed(1)))
    t, weight = importance.draw(u)
    torch.testing.assert_close(t, schedule.quantize(u), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight, torch.ones(1000, dtype=torch.float64))


def test_importance_looks_at_the_last_ten_losses_and_leaves_out_what_is_not_finite():
    importance = Importance(SMALL["scaled_linear"])
    everywhere = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    for loss in (100.0, *range(1, 6), math.nan, math.inf, *range(6, 11)):
        importance.learn(everywhere, torch.full((50,), float(loss)))
    assert (importance.counts == 11).all()
    assert importance.losses.sort(1).values.tolist() == [[float(loss) for loss in range(1, 11)]] * 50


def test_a_bin_without_losses_is_still_drawn():
    importance = taught(SMALL["scaled_linear"], lambda t: (t > 0.5).double())
    t, weight = importance.draw(U)
    assert 0 < (t < 0.5).double().mean() < 0.001 and weight.max() == pytest.approx(1000)
    silent = taught(SMALL["scaled_linear"], torch.zeros_like)
    assert silent.draw(U).weight.isfinite().all()


def test_importance_that_is_restored_goes_on_as_if_it_had_not_been():
    schedule, u = SMALL["flow"], torch.rand(400, generator=torch.Generator().manual_seed(0))
    one = taught(schedule, lambda t: 1 + t)
    other = Importance(schedule)
    other.load_state_dict(one.state_dict())
    for importance in (one, other):
        importance.learn(u, u**2)
    assert all(torch.equal(a, b) for a, b in zip(one.draw(u), other.draw(u), strict=True))
    with pytest.raises(ValueError, match="losses of 50 timesteps; this schedule has 1000"):
        Importance(SCHEDULES["flow"]).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"name": "normal"}, "density 'normal' is unknown; use one of uniform, logit_normal, mode"),
        ({"std": 0.0}, "density.std 0.0 must be a positive number"),
        ({"mean": math.nan}, "density.mean nan must be a finite number"),
        ({"scale": 2.0}, "density.scale 2.0 must be between -1 and 1.75"),
    ],
)
def test_a_wrong_density_raises_a_message_that_names_the_error(config, says):
    with pytest.raises(ValueError, match=says):
        DensityConfig(**config)
