"""After SIGKILL at any moment, a restarted run ends with the same bits as an uninterrupted one.

The moments are drawn from a seed that is printed; STIPPLE_SEED sets it. The slow test kills STIPPLE_KILLS times,
200 by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.training.tiny_runs import ROOT, SETTINGS, STAGE_1, STAGE_2, differing, metrics

# 36 images in batches of 10: one step spans two epochs. A run takes a second, a fifth of it for saving
SCHEDULE = ["trainer.batch_size=10", "trainer.micro_batch_size=5", "trainer.log_every=2", "trainer.save_every=2"]
SCHEDULE += ["trainer.steps=6", "validation.images=2"]
CASES = {
    "kl": [*STAGE_1, *SCHEDULE],
    "vq": [*STAGE_1, *SCHEDULE, "autoencoder.regularizer=vq"],
    "ldm": [*STAGE_2, *SCHEDULE, "data.flip=true", "data.crop=random", "samples.every=3", "samples.steps=2"],
}


def kill(folder: Path, autoencoder: str, kills: int) -> list[dict]:
    """Kill runs of all cases; return one line for each kill."""
    seed = int(os.environ.get("STIPPLE_SEED") or time.time_ns() % 2**32)
    print(f"STIPPLE_SEED={seed}")
    cases = {name: command + [f"autoencoder={autoencoder}"] * (name == "ldm") for name, command in CASES.items()}
    harness = ROOT / "tests" / "helpers" / "training" / "kill_harness.py"
    done = subprocess.run(
        [sys.executable, str(harness), str(folder), str(kills), str(seed)],
        input=json.dumps(cases), text=True, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(run: Path, whole: Path) -> None:
    """Assert that weights, EMA, optimizer state, model folder, images and metrics are equal, without leftovers."""
    assert metrics(run) == metrics(whole)
    for part in ("state", "model", "samples"):
        assert differing(run / part, whole / part) == []
    assert sorted(os.listdir(run)) == sorted(os.listdir(whole))


def check(folder: Path, killed: list[dict], kills: int) -> None:
    """Assert the number of kills, and that every killed run ended like the uninterrupted one of its case."""
    assert len(killed) == kills
    for case, run in sorted({(line["case"], line["run"]) for line in killed}):
        assert_same(folder / case / str(run), folder / case / "whole")
    half = [line for line in killed if line["half"]]
    print(f"{kills} kills in {len({(line['case'], line['run']) for line in killed})} runs, {len(half)} in a write")


def test_runs_killed_30_times_at_random_moments_equal_uninterrupted_runs(tmp_path, autoencoder):
    check(tmp_path, kill(tmp_path, autoencoder, 30), 30)


@pytest.mark.slow
def test_runs_killed_200_times_at_random_moments_equal_uninterrupted_runs(tmp_path, autoencoder):
    kills = int(os.environ.get("STIPPLE_KILLS") or 200)
    check(tmp_path, kill(tmp_path, autoencoder, kills), kills)
