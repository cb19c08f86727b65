"""Small pixel-space models, measured at several steps of one training run."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.quality.bits import draw, measure, table
from tests.helpers.training.tiny_runs import run_here


def photos() -> str:
    """The folder STIPPLE_PHOTOS; the test is skipped without it."""
    if not os.environ.get("STIPPLE_PHOTOS"):
        pytest.skip("needs a folder of photographs in STIPPLE_PHOTOS")
    return os.environ["STIPPLE_PHOTOS"]


def measured(name: str, folder: Path, steps: list[int], images: int, levels: int) -> dict[str, dict]:
    """Measure a pixel-space model by `benchmarks.quality.bits` after each number of steps; write NAME.json etc."""
    data, results = photos(), {}
    for count in steps:  # each continues the one before
        overrides = [f"data.folder={data}", f"run={folder / name}", f"trainer.steps={count}"]
        run_here("train_ldm.py", "--config", f"configs/ldm/{name}.yaml", *overrides)
        shutil.copytree(folder / name / "model", folder / f"{name}-{count}")
        options = Namespace(folder=data, held_out=0.02, images=images, steps=levels, seed=0, tolerance=0.01)
        results[f"{count} steps"] = measure(str(folder / f"{name}-{count}"), options)
    (folder / f"{name}.json").write_text(json.dumps(results) + "\n")
    (folder / f"{name}.md").write_text(table(results) + "\n")
    draw(results).savefig(folder / f"{name}.png", dpi=80)
    return results
