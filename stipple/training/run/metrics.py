"""Metrics of a run: averaged over micro-batches, processes and steps, and written to metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stipple_core.files.atomic import writing


class Metrics:
    """Sums of values since the last line, kept as tensors so that logging does not wait for the device.

    Averages skip values that are not finite, and lines skip names without a finite value.
    """

    def __init__(self, path: Path | None, accelerator: Accelerator, log_every: int):
        self.path, self.accelerator, self.log_every = path, accelerator, log_every
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._time, self._steps = time.monotonic(), 0

    def add(self, values: dict[str, torch.Tensor | float]) -> None:
        """Add the values of a micro-batch, each a number or a tensor, of which the mean is taken."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            value = value.to(torch.float32 if value.device.type == "mps" else torch.float64).mean()
            finite = torch.isfinite(value)
            self._sums[name] = self._sums.get(name, 0) + torch.where(finite, value, 0)
            self._counts[name] = self._counts.get(name, 0) + finite.to(value.dtype)

    def end_step(self, step: int) -> dict[str, float] | None:
        """Count an optimizer step; each `log_every` steps, write a line and return it."""
        self._steps += 1
        if step % self.log_every:
            return None
        line = {name: total / count for name, (total, count) in sorted(self.window().items()) if count}
        line["seconds_per_step"] = (time.monotonic() - self._time) / self._steps
        self._sums, self._counts, self._steps, self._time = {}, {}, 0, time.monotonic()
        self.write(step, line)
        return line

    def window(self) -> dict[str, list[float]]:
        """The current sums and counts over all processes; each has to call it."""
        if not self._sums:
            return {}
        both = [*self._sums.values(), *self._counts.values()]
        both = torch.stack([value.to(self.accelerator.device) for value in both])  # float32 on mps
        if self.accelerator.num_processes > 1:
            both = self.accelerator.reduce(both, "sum")
        sums, counts = both.tolist()[: len(self._sums)], both.tolist()[len(self._sums) :]
        return {name: [total, count] for name, total, count in zip(self._sums, sums, counts, strict=True)}

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line with the finite values to metrics.jsonl, and log them to the trackers."""
        values = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(values, step=step)

    def sync(self) -> None:
        """Make all lines durable, because those before a checkpoint are not written again."""
        if self.path is not None and self.path.exists():
            with open(self.path) as file:
                os.fsync(file.fileno())

    def rewind(self, step: int, window: dict[str, list[float]] | None = None) -> None:
        """Drop the lines after `step`, which will be written again, and restore the sums of an unfinished window."""
        self._time = time.monotonic()  # do not count the set-up
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, both in (window or {}).items():  # sums over all processes, which the main one restores
            total, count = torch.tensor(both, dtype=dtype, device=device) * self.accelerator.is_main_process
            self._sums[name], self._counts[name] = total, count
        if self.path is not None:
            drop_lines_after(self.path, step)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to `a.b.c: value`, with value types that every tracker supports."""
    flattened: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[prefix + key] = value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
    return flattened


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, which will be written again, from a JSONL file if it exists."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        with writing(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in kept)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut short by a crash
