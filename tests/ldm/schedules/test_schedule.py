"""ldm/schedules/registry.py: alpha and sigma against the papers' numbers, and what holds for every schedule."""

import numpy as np
import pytest
import torch

from ldm.schedules.formulas import resolution_shift
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from ldm.schedules.table_schedules import TableSchedule, VariancePreserving
from tests.helpers.proofs.oracles import CONFIGS, SCHEDULES

TABLES = [name for name in CONFIGS if isinstance(SCHEDULES[name], TableSchedule)]
PRESERVING = [name for name in CONFIGS if isinstance(SCHEDULES[name], VariancePreserving)]
CONTINUOUS = ["linear_continuous", "sub_vp", "edm", "flow", "flow_shift"]


def grid(count: int = 1000) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) / count


@pytest.mark.parametrize("name", SCHEDULES)
def test_clean_data_is_at_time_zero_exactly(name):
    alpha, sigma = SCHEDULES[name](0.0)
    assert (alpha.item(), sigma.item()) == (1, 0)
    assert SCHEDULES[name].snr(0.0) == torch.inf


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_only_grows(name):
    alpha, sigma = SCHEDULES[name](torch.linspace(0, 1, 5001, dtype=torch.float64))
    assert (sigma.diff() >= 0).all() and (alpha.diff() <= 0).all()
    assert (SCHEDULES[name].snr(torch.linspace(0.0003, 1, 3001, dtype=torch.float64)).diff() < 0).all()


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_is_preserved(name):
    alpha, sigma = SCHEDULES[name](torch.linspace(0, 1, 3001, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "index", "alpha_bar"),
    [
        ("scaled_linear", 0, 0.999150),
        ("scaled_linear", 499, 0.277670),
        ("scaled_linear", 999, 0.00466010),
        ("scaled_linear_0195", 999, 1.4230e-4),
        ("linear", 999, 4.0358e-5),
    ],
)
def test_alpha_bar_has_the_known_value(name, index, alpha_bar):
    alpha, _ = SCHEDULES[name]((index + 1) / 1000)
    assert alpha.item() ** 2 == pytest.approx(alpha_bar, rel=5e-5)


def test_scaled_linear_ratio_has_the_known_ends():
    alpha, sigma = SCHEDULES["scaled_linear"](torch.tensor([0.001, 1.0]))
    assert (sigma / alpha).tolist() == pytest.approx([0.029167, 14.614641], rel=2e-5)


def test_cosine_follows_its_formula_until_the_clip():
    t = grid()[:900]
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    torch.testing.assert_close(SCHEDULES["cosine"](t)[0] ** 2, f / start, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_zero_terminal_snr_ends_at_zero_keeps_its_start_and_is_affine_in_alpha(name):
    plain = make_schedule(ScheduleConfig(name=name))(grid())[0]
    schedule = make_schedule(ScheduleConfig(name=name, zero_terminal_snr=True))
    rescaled = schedule(grid())[0]
    assert rescaled[-1] == 0 and schedule.ends_in_pure_noise and schedule.snr(1.0) == 0
    assert rescaled[0].item() == pytest.approx(plain[0].item(), rel=1e-12)
    slope = rescaled.diff() / plain.diff()
    torch.testing.assert_close(slope, slope[:1].expand(999), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TABLES)
def test_log_ratio_is_linear_between_levels(name):
    schedule, k = SCHEDULES[name], torch.arange(1, 999, dtype=torch.float64)

    def log_ratio(position):
        alpha, sigma = schedule(position / 1000)
        return (sigma / alpha).log()

    middle = (log_ratio(k) + log_ratio(k + 1)) / 2
    torch.testing.assert_close(log_ratio(k + 0.5), middle, rtol=1e-9, atol=1e-9)
    alpha, sigma = schedule(torch.tensor([0.0005, 0.001], dtype=torch.float64))
    assert (sigma / alpha)[0].item() == pytest.approx((sigma / alpha)[1].item() / 2, rel=1e-12)


def test_variance_explodes_geometrically_from_sigma_min_to_sigma_max():
    alpha, sigma = SCHEDULES["ve"](grid())
    assert (alpha == 1).all()
    assert (sigma[0].item(), sigma[-1].item()) == pytest.approx((0.01, 50), rel=1e-12)
    torch.testing.assert_close(sigma[1:] / sigma[:-1], torch.full((999,), 5000 ** (1 / 999), dtype=torch.float64))


def test_sub_vp_has_the_mean_of_linear_and_the_square_of_its_variance():
    """Song et al. 2021, eq. 29: sigma is 1 - exp(-B) where that of variance preserving is its root."""
    t = grid()
    alpha, sigma = SCHEDULES["sub_vp"](t)
    integral = 0.1 * t + (20 - 0.1) * t**2 / 2
    torch.testing.assert_close(alpha, torch.exp(-integral / 2), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, 1 - torch.exp(-integral), rtol=1e-10, atol=0)
    torch.testing.assert_close(sigma, 1 - alpha**2, rtol=1e-10, atol=0)
    assert (alpha**2 + sigma**2).min().item() == pytest.approx(0.75, abs=1e-4)
    linear = SCHEDULES["linear_continuous"](t)[0]
    assert (linear / alpha - 1).abs().max() < 0.06  # the sum of betas over levels is their integral, a little more


def test_sub_vp_of_any_number_of_timesteps_has_the_papers_betas():
    few = make_schedule(ScheduleConfig(name="sub_vp", timesteps=10))
    for t in (0.1, 0.35, 1.0):
        assert few(t)[1].item() == pytest.approx(SCHEDULES["sub_vp"](t)[1].item(), rel=1e-12)


def test_edm_levels_are_those_of_the_paper():
    """Karras et al. 2022, eq. 5, its i counted from the highest of N levels down, and table 1's default constants."""
    i, n, rho = torch.arange(1000, dtype=torch.float64), 1000, 7
    paper = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    alpha, sigma = SCHEDULES["edm"](grid())
    assert (alpha == 1).all() and SCHEDULES["edm"].unit_input
    torch.testing.assert_close(sigma.flip(0), paper, rtol=1e-11, atol=0)
    below = SCHEDULES["edm"](torch.tensor([0.0, 0.0005, 0.001], dtype=torch.float64))[1]
    assert below.tolist() == pytest.approx([0, 0.001, 0.002], rel=1e-12)


def test_edm_tells_the_network_a_linear_function_of_a_quarter_of_the_logarithm_of_sigma():
    t = grid()
    noise = SCHEDULES["edm"](t)[1].log() / 4  # c_noise of table 1
    condition = SCHEDULES["edm"].timestep(t).double()
    assert (condition[0].item(), condition[-1].item()) == (0, 1000) and SCHEDULES["edm"].timestep(0.0) == 0
    torch.testing.assert_close(condition, (noise - noise[0]) / (noise[-1] - noise[0]) * 1000, rtol=1e-6, atol=1e-4)


def test_flow_is_straight_and_shift_keeps_its_ends():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(SCHEDULES["flow"](t)[1], t)
    alpha, sigma = SCHEDULES["flow_shift"](t)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(t))
    assert (sigma[0].item(), sigma[-1].item()) == (0, 1)
    ratio = sigma[1:-1] / alpha[1:-1]
    torch.testing.assert_close(ratio, 3 * t[1:-1] / (1 - t[1:-1]))  # shift multiplies sigma / alpha


def test_resolution_shift_makes_pictures_of_either_size_equally_uncertain():
    """Esser et al. 2024, eq. 22: of one value seen n times, the spread is sigma / alpha sqrt(1 / n)."""
    assert resolution_shift(1024**2, 512**2) == 2 and resolution_shift(64, 64) == 1
    shift = resolution_shift(3 * 64**2, 64**2)
    for t in (0.1, 0.5, 0.9):
        small, large = (make_schedule(ScheduleConfig(name="flow", shift=s))(t) for s in (1.0, shift))
        spread = [(sigma / alpha).item() / n**0.5 for (alpha, sigma), n in ((small, 64**2), (large, 3 * 64**2))]
        assert spread[0] == pytest.approx(spread[1])
    with pytest.raises(ValueError, match="0 pixels and 64 trained pixels must both be above 0"):
        resolution_shift(0, 64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_fading_is_the_derivative_of_log_snr(name):
    schedule, h = SCHEDULES[name], 1e-7
    t = (torch.arange(1, 999, dtype=torch.float64) + 0.5) / 1000  # between levels, where tables have a derivative
    slope = (schedule.snr(t - h).log() - schedule.snr(t + h).log()) / (2 * h)
    torch.testing.assert_close(schedule.dlogsnr_dt(t), slope, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_fading_at_a_level_is_that_of_the_interval_that_ends_there(name):
    schedule, t = SCHEDULES[name], grid()
    logs = schedule.snr(t).log()
    if not schedule.ends_in_pure_noise:
        torch.testing.assert_close(schedule.dlogsnr_dt(t)[1:], -logs.diff() * 1000, rtol=1e-8, atol=1e-8)
    assert schedule.dlogsnr_dt(t)[0] == schedule.dlogsnr_dt(t)[1]
    assert schedule.dlogsnr_dt(1.0).isinf() == schedule.ends_in_pure_noise


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_timestep_is_the_index_of_the_level(name, dtype):
    assert SCHEDULES[name].timestep(grid().to(dtype)).tolist() == list(range(1000))


@pytest.mark.parametrize("name", TABLES)
def test_float32_times_mean_the_level_itself(name):
    schedule = SCHEDULES[name]
    for single, double in zip(schedule(grid().float(), torch.float64), schedule(grid()), strict=True):
        assert torch.equal(single, double)


def test_times_below_the_first_level_have_its_timestep():
    assert SCHEDULES["scaled_linear"].timestep(torch.tensor([0.0, 0.0004])).tolist() == [0, 0]


def test_flow_tells_the_network_sigma_whatever_the_shift():
    t = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    assert SCHEDULES["flow"].timestep(t).tolist() == [250, 500, 1000]
    torch.testing.assert_close(SCHEDULES["flow_shift"].timestep(t), (SCHEDULES["flow_shift"](t)[1] * 1000).float())


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_come_in_the_dtype_of_the_time_or_the_one_asked_for(name):
    schedule, t = SCHEDULES[name], torch.tensor([0.3, 0.7])
    assert [level.dtype for level in schedule(t)] == [torch.float32] * 2
    assert [level.dtype for level in schedule(t, torch.float64)] == [torch.float64] * 2
    assert schedule(0.3)[0].dtype == torch.float64 and schedule(t.reshape(2, 1))[0].shape == (2, 1)


def test_networks_of_formulas_and_of_continuous_tables_know_all_times():
    assert [name for name in SCHEDULES if not SCHEDULES[name].discrete] == CONTINUOUS


def test_a_continuous_table_has_the_levels_of_the_discrete_one():
    t = torch.linspace(0, 1, 777, dtype=torch.float64)
    for one, other in zip(SCHEDULES["linear"](t), SCHEDULES["linear_continuous"](t), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(SCHEDULES["linear"].timestep(t), SCHEDULES["linear_continuous"].timestep(t))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in CONTINUOUS])
def test_quantize_draws_each_level_equally_often(name):
    u = (torch.arange(5000) + 0.5) / 5000
    drawn = SCHEDULES[name].timestep(SCHEDULES[name].quantize(u)).long()
    assert (drawn.bincount(minlength=1000) == 5).all() and (drawn.diff() >= 0).all()
    assert SCHEDULES[name].quantize(torch.tensor([0.0, 1 - 2**-24])).tolist() == pytest.approx([0.001, 1])


@pytest.mark.parametrize("name", CONTINUOUS)
def test_quantize_of_continuous_schedules_covers_their_times_evenly(name):
    drawn = SCHEDULES[name].quantize(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert drawn[0].item() == pytest.approx(0.001) and drawn[-1].item() == pytest.approx(1)
    torch.testing.assert_close(drawn.diff(), torch.full((1000,), 0.000999, dtype=torch.float64))


def test_the_nearest_time_is_that_of_a_level_or_in_the_trained_range():
    t = torch.tensor([0.0, 0.0014, 0.5, 0.50051, 1.0], dtype=torch.float64)
    assert SCHEDULES["linear"].nearest(t).tolist() == pytest.approx([0.001, 0.001, 0.5, 0.501, 1], abs=1e-15)
    assert SCHEDULES["edm"].nearest(t).tolist() == pytest.approx([0.001, 0.0014, 0.5, 0.50051, 1], abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_time_of_a_ratio_is_the_inverse_of_the_schedule(name):
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    alpha, sigma = SCHEDULES[name](t)
    torch.testing.assert_close(SCHEDULES[name].time(sigma / alpha), t, rtol=0, atol=1e-9)
    assert SCHEDULES[name].time(0.0) == 0 and SCHEDULES[name].time(1e9) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("name", "reference"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_tables_are_those_of_diffusers(name, reference):
    diffusers = pytest.importorskip("diffusers")
    alpha_bar = diffusers.DDIMScheduler(beta_schedule=reference).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(
        SCHEDULES[name](grid())[0].square().numpy(), alpha_bar, rtol=2e-4
    )  # diffusers' are float32


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ScheduleConfig(name="karras"), "unknown schedule 'karras'; use one of linear"),
        (ScheduleConfig(timesteps=1), "timesteps 1 must be at least 2"),
        (ScheduleConfig(beta_start=0.1, beta_end=0.01), "beta_start 0.1 and beta_end 0.01"),
        (ScheduleConfig(name="ve", sigma_min=0.0), "sigma_min 0.0"),
        (ScheduleConfig(name="edm", sigma_max=0.001), "sigma_min 0.002 must be above 0 and below sigma_max 0.001"),
        (ScheduleConfig(name="sub_vp", beta_start=0.0), "0 < beta_start <= beta_end < inf"),
        (ScheduleConfig(name="flow", shift=0.0), "shift 0.0"),
        (ScheduleConfig(name="flow", zero_terminal_snr=True), "zero_terminal_snr is for"),
        (ScheduleConfig(name="edm", zero_terminal_snr=True), "zero_terminal_snr is for .* not edm"),
    ],
)
def test_a_wrong_config_raises_a_message_that_names_the_error(config, says):
    with pytest.raises(ValueError, match=says):
        make_schedule(config)


def test_a_schedule_knows_the_constants_it_was_made_of():
    for name, ends in {"ve": (0.01, 50), "edm": (0.002, 80)}.items():
        config = make_schedule(ScheduleConfig(name=name)).config
        assert (config.sigma_min, config.sigma_max) == ends
    assert make_schedule(ScheduleConfig(name="sub_vp")).config.beta_end == 0.02
    assert make_schedule(ScheduleConfig(name="linear")).config.beta_end == 0.02
    assert make_schedule(ScheduleConfig(beta_end=0.0155)).config.beta_start == 0.00085


def test_wrong_times_raise_a_message_that_names_the_error():
    schedule = SCHEDULES["scaled_linear"]
    for outside in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            schedule(outside)
    with pytest.raises(ValueError, match="bfloat16"):
        schedule(torch.tensor([0.5], dtype=torch.bfloat16))
