"""Numbers of a run: averaged over micro-batches, processes and steps, then a line of metrics.jsonl."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator


class Metrics:
    """Sums since the last line, kept as tensors so that logging does not wait for the device."""

    def __init__(self, path: Path | None, accelerator: Accelerator, log_every: int):
        self.path, self.accelerator, self.log_every = path, accelerator, log_every
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._time, self._steps = time.monotonic(), 0

    def add(self, values: dict[str, torch.Tensor | float]) -> None:
        """Add one micro-batch's values, each a number or a tensor (its mean is taken)."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            value = value.to(torch.float32 if value.device.type == "mps" else torch.float64).mean()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def end_step(self, step: int) -> dict[str, float] | None:
        """Count an optimizer step; at every `log_every`-th write the line and return it."""
        self._steps += 1
        if step % self.log_every:
            return None
        line = {name: total / count for name, (total, count) in sorted(self.window().items())}
        line["seconds_per_step"] = (time.monotonic() - self._time) / self._steps
        self._sums, self._counts, self._steps, self._time = {}, {}, 0, time.monotonic()
        self.write(step, line)
        return line

    def window(self) -> dict[str, list[float]]:
        """The sums and counts so far, averaged over processes; every process calls it."""
        if not self._sums:
            return {}
        sums = torch.stack([value.double().to(self.accelerator.device) for value in self._sums.values()])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "mean")
        return {name: [float(s), self._counts[name]] for name, s in zip(self._sums, sums, strict=True)}

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and give it to the trackers."""
        values = {name: float(value) for name, value in values.items()}
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(values, step=step)

    def rewind(self, step: int, window: dict[str, list[float]] | None = None) -> None:
        """Drop the lines after `step`, which will be written again, and take up the sums of an unfinished window."""
        self._time = time.monotonic()  # what came before was set-up
        for name, (total, count) in (window or {}).items():
            self._sums[name], self._counts[name] = torch.tensor(total, dtype=torch.float64), count
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self.path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line cut short by a crash
