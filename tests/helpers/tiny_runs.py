"""The real scripts on the pictures of tests/, as processes or in this one, and what they leave behind."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGE_1 = ["train_autoencoder.py", "--config", "configs/autoencoder/tiny.yaml"]
CACHE = ["stipple.commands.cache", "--config", "configs/ldm/tiny.yaml"]
STAGE_2 = ["train_ldm.py", "--config", "configs/ldm/tiny.yaml"]
SETTINGS = {  # one thread, for the order of every sum to be the same; nothing is downloaded
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def start(*command: str, processes: int = 0, **options) -> subprocess.Popen:
    """A script of ours, or a module of a command, as a process; under `accelerate launch` where `processes` is not 0.

    By its other name, `accelerate-launch`, which needs 3 seconds less: the first imports all commands of accelerate.
    """
    launch = ["-m", "accelerate.commands.launch"] if processes else []
    if processes > 1:
        launch += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    module = [] if command[0].endswith(".py") else ["-m"]
    return subprocess.Popen(
        [sys.executable, *launch, *module, *command], cwd=ROOT, env=os.environ | SETTINGS, **options
    )


def launch(*command: str, processes: int = 0) -> str:
    """What the script prints; its standard error is shown where it fails."""
    process = start(*command, processes=processes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def run_here(*command: str) -> None:
    """The script's `main` in this process; the caller has set one thread."""
    importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
    gc.collect()  # with the trainer goes its lock


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and training loss of each line that has one."""
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(a: Path, b: Path) -> list[str]:
    """Names of the files that two folders do not have alike, to the last byte."""
    left, right = files(a), files(b)
    assert left and right
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def final_state(run: Path) -> bytes:
    """The last state.safetensors: weights, moving averages, moments."""
    return (sorted((run / "state").iterdir())[-1] / "state.safetensors").read_bytes()
