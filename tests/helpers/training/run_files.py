"""Reading the files of a training run strictly: JSON without NaN, weights without values that are not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def bad_steps(run: Path) -> list[dict]:
    """The lines of bad_steps.jsonl."""
    path = run / "bad_steps.jsonl"
    return [strict_json(line) for line in path.read_text().splitlines()] if path.exists() else []


def strict_json(line: str) -> dict:
    """Parse a line of JSON; fail for NaN and infinity, which are not JSON."""
    return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON: {line}"))


def assert_finite_on_disk(run: Path) -> None:
    """Assert that all values in checkpoints and model are finite, and that metrics are JSON."""
    files = [*(run / "state").rglob("*.safetensors"), *(run / "model").rglob("*.safetensors")]
    assert files
    for path in files:
        for name, value in load_file(path).items():
            assert not value.is_floating_point() or torch.isfinite(value).all(), (path, name)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        strict_json(line)
