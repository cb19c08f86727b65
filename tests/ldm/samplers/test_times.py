"""ldm/samplers/spacing.py: what holds for all walks, and the numbers of the programs that they are taken from."""

from dataclasses import replace

import pytest
import torch

from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS, TimeDefaults, times
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from tests.helpers.proofs.oracles import SCHEDULES

VP = SCHEDULES["scaled_linear"]
DEFAULTS = {
    "lattice": TimeDefaults(),
    "fractional": TimeDefaults(fractional=True),
    "solver": TimeDefaults(drops_lowest=True),
}


def indices(*arguments, **options):
    return VP.timestep(times(VP, *arguments, **options)[:-1]).tolist()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("time_defaults", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_times_fall_from_at_most_one_to_zero(name, spacing, time_defaults):
    for steps in (1, 2, 3, 7, 13, 50, 499, 500, 600, 999, 1000):
        walk = times(SCHEDULES[name], steps, spacing, time_defaults)
        assert walk.shape == (steps + 1,) and walk.dtype == torch.float64 and walk[-1] == 0
        assert (walk.diff() < 0).all() and walk[0] <= 1
        assert walk[0] == 1 or spacing not in ("trailing", "linspace", "ays")


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("time_defaults", ["lattice", "solver"])
@pytest.mark.parametrize("steps", [1, 7, 30, 50, 600, 1000])
def test_times_are_those_of_noise_levels(spacing, time_defaults, steps):
    found = torch.tensor(indices(steps, spacing, DEFAULTS[time_defaults]))
    assert torch.equal(found, found.round())


def test_every_level_is_visited_where_there_are_as_many_steps():
    for spacing in ("trailing", "leading", "linspace"):
        for time_defaults in DEFAULTS.values():
            assert indices(1000, spacing, time_defaults) == list(range(999, -1, -1))


def test_leading_times_are_those_of_ldm():
    assert indices(50, "leading") == list(range(981, 0, -20))
    assert indices(30, "leading")[:3] == [958, 925, 892]  # whole strides of 1000 // 30: the highest is never reached
    assert indices(50, "leading", offset=0) == list(range(980, -1, -20))
    assert indices(7, "leading", DEFAULTS["solver"]) == [876, 751, 626, 501, 376, 251, 126]


def test_linspace_is_rounded_or_not_and_ends_at_the_first_level_or_above():
    assert indices(4, "linspace") == [999, 666, 333, 0]
    assert indices(5, "linspace") == [999, 749, 500, 250, 0]
    assert indices(5, "linspace", DEFAULTS["fractional"]) == [999, 749.25, 499.5, 249.75, 0]
    assert indices(4, "linspace", DEFAULTS["solver"]) == [999, 749, 500, 250]


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "ve"])
def test_karras_spaces_the_seventh_root_of_the_noise_evenly(name):
    """Karras et al. 2022, eq. 5, from the last noise level to the first."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule(times(schedule, 20, "karras")[:-1])
    roots = (sigma / alpha) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(19), rtol=1e-6, atol=0)
    alpha, sigma = schedule(torch.tensor([1.0, 0.001], dtype=torch.float64))
    torch.testing.assert_close(roots[[0, -1]], (sigma / alpha) ** (1 / 7))


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_falls_evenly_from_the_last_noise_level_to_the_first(name):
    schedule = SCHEDULES[name]
    logs = schedule.snr(times(schedule, 20, "log_snr")[:-1]).log()
    torch.testing.assert_close(logs.diff(), logs.diff().mean().expand(19), rtol=1e-6, atol=0)
    first, last = schedule.snr(torch.tensor([0.001, 1.0], dtype=torch.float64))
    first, last = first.log(), (torch.tensor(4096.0**-2) if last == 0 else last).log()
    assert (logs[0].item(), logs[-1].item()) == pytest.approx((last.item(), first.item()), abs=1e-6)


@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_where_no_signal_is_left_logs_and_roots_begin_at_a_large_ratio(spacing):
    for name in ("zero_terminal", "flow"):
        alpha, sigma = SCHEDULES[name](times(SCHEDULES[name], 5, spacing)[0])
        assert (sigma / alpha).item() == pytest.approx(4096)


def test_log_snr_is_the_exponential_spacing_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_exponential_sigmas=True
    )
    reference.set_timesteps(13)
    alpha, sigma = VP(times(VP, 13, "log_snr"))
    torch.testing.assert_close((sigma / alpha).float(), reference.sigmas, rtol=1e-4, atol=0)  # diffusers' are float32


def test_aligned_steps_are_the_published_timesteps_of_stable_diffusion():
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # of noise levels rounded to three digits
    assert indices(10, "ays") == pytest.approx(published, abs=0.6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [10, 20, 70])
def test_aligned_steps_keep_their_noise_levels_on_every_schedule_that_reaches_them(name, steps):
    """Where steps are a multiple of ten each tenth part begins at one of the published levels."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule(times(schedule, steps, "ays")[: steps : steps // 10][1:])
    published = [6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
    assert (sigma / alpha).tolist() == pytest.approx(published, rel=1e-9)


def test_aligned_steps_between_the_published_levels_are_even_in_logs():
    alpha, sigma = VP(times(VP, 20, "ays")[:-1])
    logs = (sigma / alpha).log()
    torch.testing.assert_close(logs[1:-1:2], (logs[:-2:2] + logs[2::2]) / 2)


def test_aligned_steps_fall_on_schedules_that_do_not_reach_their_levels():
    for ends in ({"sigma_max": 3.0}, {"sigma_min": 0.5}, {"sigma_min": 1.0, "sigma_max": 1.1}, {"sigma_max": 0.02}):
        schedule = make_schedule(ScheduleConfig(name="ve", **ends))
        for steps in (1, 7, 10, 999, 1000):
            walk = times(schedule, steps, "ays")
            assert walk[0] == 1 and (walk.diff() < 0).all() and walk[-2] >= 0.001


@pytest.mark.parametrize("spacing", ["karras", "log_snr", "ays"])
def test_spacings_of_noise_fall_between_levels_so_that_no_two_times_are_one(spacing):
    """Of a thousand, many have the same level of a table as the nearest: so the network gets fractional timesteps."""
    found = torch.tensor(indices(1000, spacing), dtype=torch.float64)
    assert len(found.unique()) == 1000 and len(found.round().unique()) < 900


def test_times_end_clean_unless_the_defaults_or_the_model_specify_otherwise():
    for time_defaults, specified, end in [
        (None, False, 0),
        (True, None, 0),
        (True, False, 0.001),
        (False, None, 0.001),
    ]:
        assert times(VP, 5, "trailing", TimeDefaults(ends_clean=time_defaults), ends_clean=specified)[-1] == end
    assert times(VP, 5, "trailing", TimeDefaults(ends_clean=False), ends_clean=True)[-1] == 0


def test_the_offset_gives_way_before_a_time_passes_one():
    assert indices(10, "leading", offset=500)[0] == 999
    for steps in (999, 1000):
        assert max(indices(steps, "leading", replace(SAMPLERS["unipc"].time_defaults))) <= 999


def test_wrong_arguments_raise_a_message_that_names_the_error():
    with pytest.raises(ValueError, match="0 steps"):
        times(VP, 0)
    with pytest.raises(ValueError, match="1001 steps"):
        times(VP, 1001)
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        times(VP, 10, "even")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 50])
def test_rungs_are_the_times_of_lcm(steps):
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps, original_inference_steps=50)
    stipple = times(make_schedule(ScheduleConfig(name="scaled_linear")), steps, "rungs")
    assert [round(t * 1000) - 1 for t in stipple[:-1].tolist()] == scheduler.timesteps.tolist()
    assert stipple[-1] == 0
