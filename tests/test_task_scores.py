"""The proof of the score SDE's likelihood: the ODE's bits of held-out pictures are below those of the bound.

STIPPLE_PHOTOS=FOLDER pytest -m slow -n 0 tests/test_task_scores.py --basetemp=runs/scores

The results are in docs/tasks/scores.md.
"""

from __future__ import annotations

import pytest
from pixel_runs import measured

STEPS = [150, 600, 1200]


@pytest.fixture(scope="module")
def results(tmp_path_factory, settings_of_runs) -> list[dict]:
    found = measured("vpsde-small", tmp_path_factory.mktemp("scores"), STEPS, images=16, levels=500)
    return [found[f"{steps} steps"] for steps in STEPS]


@pytest.mark.slow
def test_the_odes_bits_are_below_the_bound_of_the_same_trained_model_on_the_same_pictures(results):
    for result in results[1:]:
        assert result["ode"] < result["bound"]
        assert result["above_ode"] > 0.9  # nearly each picture's, not only the mean


@pytest.mark.slow
def test_both_fall_with_training(results):
    for name in ("bound", "ode"):
        bits = [result[name] for result in results]
        assert bits == sorted(bits, reverse=True)
