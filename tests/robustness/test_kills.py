"""Training can't be killed: whatever SIGKILL hits, a run started again ends as one that was never touched, bit for bit.

The moments are drawn from a seed that is printed, and so shown where a test fails; STIPPLE_SEED sets it. The slow
test kills STIPPLE_KILLS times, or 200.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tiny_runs import ROOT, SETTINGS, STAGE_1, STAGE_2, differing, metrics

# 36 pictures in batches of 10: one step goes over the end of an epoch; a life takes a second, a fifth of it for saves
SCHEDULE = ["trainer.batch_size=10", "trainer.micro_batch_size=5", "trainer.log_every=2", "trainer.save_every=2"]
SCHEDULE += ["trainer.steps=6", "validation.images=2"]
CASES = {
    "kl": [*STAGE_1, *SCHEDULE],
    "vq": [*STAGE_1, *SCHEDULE, "autoencoder.regularizer=vq"],
    "ldm": [*STAGE_2, *SCHEDULE, "data.flip=true", "data.crop=random", "samples.every=3", "samples.steps=2"],
}


def kill(folder: Path, autoencoder: str, kills: int) -> list[dict]:
    """Kill runs of all cases, check what each leaves, and say when they were killed."""
    seed = int(os.environ.get("STIPPLE_SEED") or time.time_ns() % 2**32)
    print(f"STIPPLE_SEED={seed}")
    cases = {name: command + [f"autoencoder={autoencoder}"] * (name == "ldm") for name, command in CASES.items()}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_harness.py"), str(folder), str(kills), str(seed)],
        input=json.dumps(cases), text=True, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(run: Path, whole: Path) -> None:
    """Weights, averages, moments, model folder, pictures and metrics; and nothing else is left."""
    assert metrics(run) == metrics(whole)
    for part in ("state", "model", "samples"):
        assert differing(run / part, whole / part) == []
    assert sorted(os.listdir(run)) == sorted(os.listdir(whole))


def check(folder: Path, killed: list[dict], kills: int) -> None:
    """All kills were spent, and every run that they hit ended as the whole one of its case."""
    assert len(killed) == kills
    for case, run in sorted({(line["case"], line["run"]) for line in killed}):
        assert_same(folder / case / str(run), folder / case / "whole")
    half = [line for line in killed if line["half"]]
    print(f"{kills} kills in {len({(line['case'], line['run']) for line in killed})} runs, {len(half)} in a write")


def test_runs_killed_30_times_at_random_moments_end_as_if_they_had_not_been(tmp_path, autoencoder):
    check(tmp_path, kill(tmp_path, autoencoder, 30), 30)


@pytest.mark.slow
def test_runs_killed_200_times_at_random_moments_end_as_if_they_had_not_been(tmp_path, autoencoder):
    kills = int(os.environ.get("STIPPLE_KILLS") or 200)
    check(tmp_path, kill(tmp_path, autoencoder, kills), kills)
