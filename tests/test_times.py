"""ldm/times.py: what holds for all walks, and the numbers of the programs that they are taken from."""

from dataclasses import replace

import pytest
import torch
from oracles import SCHEDULES

from ldm.samplers import SAMPLERS
from ldm.times import SPACINGS, Habit, times

VP = SCHEDULES["scaled_linear"]
HABITS = {"lattice": Habit(), "fractional": Habit(fractional=True), "solver": Habit(drops_lowest=True)}


def indices(*arguments, **options):
    return VP.timestep(times(VP, *arguments, **options)[:-1]).tolist()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS.keys())
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 499, 500, 600, 999, 1000])
def test_times_fall_from_at_most_one_to_zero(name, spacing, habit, steps):
    walk = times(SCHEDULES[name], steps, spacing, habit)
    assert walk.shape == (steps + 1,) and walk.dtype == torch.float64 and walk[-1] == 0
    assert (walk.diff() < 0).all() and walk[0] <= 1
    if spacing in ("trailing", "linspace"):
        assert walk[0] == 1


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("habit", ["lattice", "solver"])
@pytest.mark.parametrize("steps", [1, 7, 30, 50, 600, 1000])
def test_times_are_those_of_noise_levels(spacing, habit, steps):
    found = torch.tensor(indices(steps, spacing, HABITS[habit]))
    assert torch.equal(found, found.round())


def test_every_level_is_visited_where_there_are_as_many_steps():
    for spacing in ("trailing", "leading", "linspace"):
        for habit in HABITS.values():
            assert indices(1000, spacing, habit) == list(range(999, -1, -1))


def test_leading_times_are_those_of_ldm():
    assert indices(50, "leading") == list(range(981, 0, -20))
    assert indices(30, "leading")[:3] == [958, 925, 892]  # whole strides of 1000 // 30: the highest is never reached
    assert indices(50, "leading", offset=0) == list(range(980, -1, -20))
    assert indices(7, "leading", HABITS["solver"]) == [876, 751, 626, 501, 376, 251, 126]


def test_linspace_is_rounded_or_not_and_ends_at_the_first_level_or_above():
    assert indices(4, "linspace") == [999, 666, 333, 0]
    assert indices(5, "linspace") == [999, 749, 500, 250, 0]
    assert indices(5, "linspace", HABITS["fractional"]) == [999, 749.25, 499.5, 249.75, 0]
    assert indices(4, "linspace", HABITS["solver"]) == [999, 749, 500, 250]


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "ve"])
def test_karras_spaces_the_seventh_root_of_the_noise_evenly(name):
    """Karras et al. 2022, eq. 5, from the last noise level to the first."""
    schedule = SCHEDULES[name]
    alpha, sigma = schedule(times(schedule, 20, "karras")[:-1])
    roots = (sigma / alpha) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(19), rtol=1e-6, atol=0)
    alpha, sigma = schedule(torch.tensor([1.0, 0.001], dtype=torch.float64))
    torch.testing.assert_close(roots[[0, -1]], (sigma / alpha) ** (1 / 7))


def test_where_no_signal_is_left_karras_begins_at_a_large_ratio():
    for name in ("zero_terminal", "flow"):
        alpha, sigma = SCHEDULES[name](times(SCHEDULES[name], 5, "karras")[0])
        assert (sigma / alpha).item() == pytest.approx(4096)


def test_a_walk_ends_clean_unless_habit_or_model_say_otherwise():
    for habit, said, end in [(None, False, 0), (True, None, 0), (True, False, 0.001), (False, None, 0.001)]:
        assert times(VP, 5, "trailing", Habit(ends_clean=habit), ends_clean=said)[-1] == end
    assert times(VP, 5, "trailing", Habit(ends_clean=False), ends_clean=True)[-1] == 0


def test_the_offset_gives_way_before_a_time_passes_one():
    assert indices(10, "leading", offset=500)[0] == 999
    for steps in (999, 1000):
        assert max(indices(steps, "leading", replace(SAMPLERS["unipc"].habit))) <= 999


def test_wrong_requests_say_what_is_wrong():
    with pytest.raises(ValueError, match="0 steps"):
        times(VP, 0)
    with pytest.raises(ValueError, match="1001 steps"):
        times(VP, 1001)
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        times(VP, 10, "even")
