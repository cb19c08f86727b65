"""Short runs of the scripts on the images of tests/pictures, and reading of their files."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from stipple.training.run.run_folder import LOCK

ROOT = Path(__file__).parents[3]
STAGE_1 = ["train_autoencoder.py", "--config", "configs/autoencoder/tiny.yaml"]
CACHE = ["stipple.commands.cache", "--config", "configs/ldm/tiny.yaml"]
STAGE_2 = ["train_ldm.py", "--config", "configs/ldm/tiny.yaml"]
SETTINGS = {  # one thread, so that sums have the same order; no downloads
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def start(*command: str, processes: int = 0, **options) -> subprocess.Popen:
    """Start a script or command module as a process, by `accelerate launch` if `processes` is not 0.

    `accelerate.commands.launch` is started directly, which imports 3 seconds faster than the command `accelerate`.
    """
    launch = ["-m", "accelerate.commands.launch"] if processes else []
    if processes > 1:
        launch += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    module = [] if command[0].endswith(".py") else ["-m"]
    return subprocess.Popen(
        [sys.executable, *launch, *module, *command], cwd=ROOT, env=os.environ | SETTINGS, **options
    )


def launch(*command: str, processes: int = 0) -> str:
    """Run a script; return its standard output. Raises AssertionError with its standard error if it fails."""
    process = start(*command, processes=processes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def run_here(*command: str) -> None:
    """Run the `main` of a script in this process. The caller must set one thread."""
    importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
    gc.collect()  # releases the lock of the trainer


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and training loss of each line with a loss."""
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


def files(folder: Path) -> dict[str, bytes]:
    """The contents of all files of a folder by relative name, without the lock, which names the process."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def differing(a: Path, b: Path) -> list[str]:
    """Names of files that differ between two folders."""
    left, right = files(a), files(b)
    assert left and right
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def final_state(run: Path) -> bytes:
    """The last state.safetensors, with weights, EMA and optimizer state."""
    return (sorted((run / "state").iterdir())[-1] / "state.safetensors").read_bytes()
