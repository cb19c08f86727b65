"""Memory is constant: it grows by less than 1 MiB per 1,000 steps after the warm-up, and no file stays open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.training.tiny_runs import ROOT, SETTINGS, STAGE_1, STAGE_2, launch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
SELDOM = [f"{name}=500" for name in ("trainer.save_every", "validation.every")] + ["trainer.log_every=10"]
TRAININGS = {
    "kl": STAGE_1,
    "vq": [*STAGE_1, "autoencoder.regularizer=vq"],
    "ldm": [*STAGE_2, "samples.every=500"],
}
STEPS, WARM_UP, PICTURES = 4000, 1000, 320


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A run of one step for each stage."""
    folder = tmp_path_factory.mktemp("models")
    launch(*STAGE_1, f"run={folder / 'autoencoder'}", "trainer.steps=1")
    vae = f"autoencoder={folder / 'autoencoder' / 'model'}"
    launch(*STAGE_2, f"run={folder / 'ldm'}", "trainer.steps=1", vae)
    return folder


def watch(out: Path, every: int, *command: str) -> np.ndarray:
    """Rows of step or image number, resident MiB, and open files."""
    script = ROOT / "tests" / "helpers" / "training" / "memory_runs.py"
    program = [sys.executable, str(script), str(out), str(every), *command]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | SETTINGS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.array([json.loads(line) for line in out.read_text().splitlines()]) / [1, 2**20, 1]


def slope(rows: np.ndarray, after: int) -> float:
    """MiB per 1,000 steps after the warm-up, by least squares. Asserts that the number of open files is constant."""
    rows = rows[rows[:, 0] >= after]
    assert len(rows) > 10 and len(set(rows[:, 2])) == 1
    growth = np.polyfit(rows[:, 0] / 1000, rows[:, 1], 1)[0]
    print(f"{growth:.2f} MiB per 1,000, from {rows[0, 1]:.1f} to {rows[-1, 1]:.1f} MiB; {rows[0, 2]:.0f} files")
    return growth


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", TRAININGS)
def test_memory_is_constant_during_training(name, workers, models, tmp_path):
    command = [*TRAININGS[name], *SELDOM, f"run={tmp_path / 'run'}", f"trainer.steps={STEPS}"]
    command += [f"trainer.workers={workers}"]
    command += [f"autoencoder={models / 'autoencoder' / 'model'}"] * (name == "ldm")
    assert slope(watch(tmp_path / "out", 100, "train", *command), WARM_UP) < 1


def test_memory_is_constant_during_sampling(models, tmp_path):
    rows = watch(tmp_path / "out", 10, "sample", str(models / "ldm" / "model"), str(PICTURES))
    warm = rows[rows[:, 0] >= 20]
    slope(rows, 20)
    assert warm[-1, 1] - warm[0, 1] < 1  # MiB over 300 images
