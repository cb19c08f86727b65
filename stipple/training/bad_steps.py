"""Skips optimizer steps with a non-finite loss or gradient: all processes agree, the step is undone and reported.

A skipped step changes nothing: weights, moments and averages wait for the result of `passes`, the buffers of networks
are restored, and scripts that keep other state check `step_skipped`. If a step has two optimizers, as in adversarial
training, each is checked alone: one may be updated while the other is not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from stipple.training.optimization.optimizer import Optimizer
from stipple_core.files.checkpoint_folder import newest_valid

SHOWN = 5  # samples that are printed; the file has all


class Diverged(SystemExit):
    """Ends a run after too many non-finite steps in a row; nothing is saved after the last checkpoint."""


class BadSteps:
    """Checks the steps of a run; every process has an instance, and all come to the same result.

    Args:
        path: of the file that gets a line for each bad step; None on all processes but the main one.
        device: of the losses.
        world: number of processes.
        limit: number of bad steps in a row, of one optimizer, that ends the run.
        precision: of the run, for the advice in the error message.
    """

    def __init__(self, path: Path | None, device: torch.device, world: int, limit: int, precision: str = "no"):
        self.path, self.device, self.world, self.limit, self.precision = path, device, world, limit, precision
        self.step_skipped = False  # whether an update of the current step was skipped
        self._samples: list[list[str]] = []  # of each micro-batch of this process
        self._losses: dict[str, list[torch.Tensor]] = {}  # of each optimizer, one for each micro-batch
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []  # with their values before the step

    def begin(self, buffers: Iterable[torch.Tensor]) -> None:
        """Start a step; `buffers` are those of the networks."""
        self.step_skipped, self._samples, self._losses = False, [], {}
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def add_samples(self, names: Sequence[str]) -> None:
        """Add the names of the samples of the next micro-batch."""
        self._samples.append(list(names))

    def add_loss(self, optimizer: str, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch; it is read at the end of the step, so that nothing waits for the device."""
        self._losses.setdefault(optimizer, []).append(loss.detach().float())

    def passes(self, optimizer: str, norm: torch.Tensor) -> bool:
        """Whether all losses and the gradient norm are finite on all processes; each has to call it.

        The square of the norm has to be finite too, because it bounds the second moments of the gradient.
        """
        finite = torch.isfinite(torch.stack([*self._losses[optimizer], (norm * norm).float().to(self.device)])).all()
        if self.world > 1:
            finite = finite.to(torch.int32)
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        passed = bool(finite)  # the only wait for the device
        self.step_skipped |= not passed
        return passed

    def skip(self, step: int, optimizer: Optimizer, norm: torch.Tensor) -> None:
        """Skip an update; prints and counts the step if it is a bad one. Every process has to call it.

        Buffers are restored now, for what is measured before the end of the step, and again at its end.

        Raises:
            Diverged: on all processes, after too many bad steps in a row.
        """
        self._restore()
        losses = gather_object([float(loss) for loss in self._losses[optimizer.name]])
        if optimizer.skip(losses_finite=all(map(math.isfinite, losses))):
            self._report(step, optimizer.name, float(norm), losses)
            if optimizer.bad_steps >= self.limit:
                self._end_run(optimizer.bad_steps)

    def end(self) -> None:
        """End the step; restores the buffers if it was skipped."""
        if self.step_skipped:
            self._restore()

    def _restore(self) -> None:
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def _report(self, step: int, optimizer: str, norm: float, losses: Sequence[float]) -> None:
        """Print and write the samples: of micro-batches with a non-finite loss, or of all if only a gradient is."""
        samples = gather_object(self._samples)
        if self.path is None:
            return
        bad = [names for names, loss in zip(samples, losses, strict=True) if not math.isfinite(loss)] or samples
        names = [name for micro_batch in bad for name in micro_batch]
        loss = sum(losses) / len(losses)
        row = {"step": step, "optimizer": optimizer, "loss": _plain(loss), "gradient_norm": _plain(norm)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "samples": names}, allow_nan=False) + "\n")
        shown = ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
        message = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g} of {optimizer}; this update was skipped"
        tqdm.write(message + f" (samples: {shown})" * bool(names))

    def _end_run(self, count: int) -> None:
        if self.path is not None:
            last = newest_valid(self.path.parent / "state", sums=False)
            saved = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
            wider = " use precision bf16," * (self.precision == "fp16")
            fix = f"lower the learning rate,{wider} or look at the samples named in {self.path}"
            tqdm.write(f"error: {count} steps in a row were not finite; {saved}; {fix}", file=sys.stderr)
        raise Diverged(1)


def _plain(value: float) -> float | str:
    """A number for JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
