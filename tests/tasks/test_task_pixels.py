"""Proof of DDPM in pixel space: bits per dimension of held-out images fall with training.

STIPPLE_PHOTOS=FOLDER pytest -m slow -n 0 tests/tasks/test_task_pixels.py --basetemp=runs/pixels

The results are in docs/tasks/pixels.md.
"""

from __future__ import annotations

import pytest

from tests.helpers.training.pixel_runs import measured

STEPS = [100, 400, 700]


@pytest.fixture(scope="module")
def results(tmp_path_factory, settings_of_runs) -> list[dict]:
    found = measured("ddpm-small", tmp_path_factory.mktemp("pixels"), STEPS, images=8, levels=250)
    return [found[f"{steps} steps"] for steps in STEPS]


@pytest.mark.slow
def test_bits_per_dimension_of_held_out_images_fall_with_training_and_are_below_raw_ones(results):
    bounds = [result["bound"] for result in results]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < bounds[0] - 0.5 and bounds[-1] < 8


@pytest.mark.slow
def test_distortion_falls_with_bits_and_most_bits_reduce_it_little(results):
    curve = results[-1]["curve"]
    assert curve["rate"] == sorted(curve["rate"])
    falling = [curve["distortion"][index] for index in range(0, len(curve["distortion"]), 20)]
    assert falling == sorted(falling, reverse=True)
    half = next(i for i, rate in enumerate(curve["rate"]) if rate > curve["rate"][-1] / 2)
    assert curve["distortion"][half] < 0.2 * curve["distortion"][0]  # Ho et al. 2020, figure 5
