"""Optimizer steps that are left out because a loss or a gradient is not finite: agreed on, undone, told and counted.

Nothing learns from such a step: not weights, moments and averages, which wait for the answer of `passes`; not the
buffers of networks, which are put back; and not what a script keeps beside them, which asks `step_skipped`. Where a step
has two optimizers, as in an adversarial game, each is judged alone: one may be updated while the other is not.
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

SHOWN = 5  # samples named on the screen; the file has all


class Diverged(SystemExit):
    """The run ended because too many steps in a row were not finite; nothing was saved since the last checkpoint."""


class BadSteps:
    """Guards the steps of a run; every process has one, and all find the same.

    Args:
        path: of the file that gets a line for each bad step; None on all processes but the main one.
        device: of the losses.
        world: how many processes there are.
        limit: bad steps in a row, of one optimizer, that end the run.
        precision: of the run, for what to do about them.
    """

    def __init__(self, path: Path | None, device: torch.device, world: int, limit: int, precision: str = "no"):
        self.path, self.device, self.world, self.limit, self.precision = path, device, world, limit, precision
        self.step_skipped = False  # whether an update of the step under way was left out
        self._samples: list[list[str]] = []  # of each micro-batch of this process
        self._losses: dict[str, list[torch.Tensor]] = {}  # of each optimizer, micro-batch by micro-batch
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []  # and what was in them before the step

    def begin(self, buffers: Iterable[torch.Tensor]) -> None:
        """A new step, before which the networks' buffers are as they are."""
        self.step_skipped, self._samples, self._losses = False, [], {}
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def add_samples(self, names: Sequence[str]) -> None:
        """The samples of the next micro-batch."""
        self._samples.append(list(names))

    def add_loss(self, optimizer: str, loss: torch.Tensor) -> None:
        """A micro-batch's loss; it is not looked at before the step's end, so that nothing waits for the device."""
        self._losses.setdefault(optimizer, []).append(loss.detach().float())

    def passes(self, optimizer: str, norm: torch.Tensor) -> bool:
        """Whether all losses and the gradient's norm are finite on all processes, which all call this.

        The norm's square has to be finite, too: it bounds the second moments of the gradient.
        """
        finite = torch.isfinite(torch.stack([*self._losses[optimizer], (norm * norm).float().to(self.device)])).all()
        if self.world > 1:
            finite = finite.to(torch.int32)
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        passed = bool(finite)  # the one wait for the device
        self.step_skipped |= not passed
        return passed

    def skip(self, step: int, optimizer: Optimizer, norm: torch.Tensor) -> None:
        """Instead of an update; tells and counts the step if it was a bad one. Every process calls it.

        Buffers forget the step now, for what is measured before its end, and again at its end.

        Raises:
            Diverged: on all processes, after too many in a row.
        """
        self._restore()
        losses = gather_object([float(loss) for loss in self._losses[optimizer.name]])
        if optimizer.skip(losses_finite=all(map(math.isfinite, losses))):
            self._tell(step, optimizer.name, float(norm), losses)
            if optimizer.bad_steps >= self.limit:
                self._end(optimizer.bad_steps)

    def end(self) -> None:
        """The step is over: buffers forget one that was left out."""
        if self.step_skipped:
            self._restore()

    def _restore(self) -> None:
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def _tell(self, step: int, optimizer: str, norm: float, losses: Sequence[float]) -> None:
        """Print and write the samples: of micro-batches whose loss is not finite; of all, if only a gradient is not."""
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
        told = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g} of {optimizer}; this update was left out"
        tqdm.write(told + f" (samples: {shown})" * bool(names))

    def _end(self, count: int) -> None:
        if self.path is not None:
            last = newest_valid(self.path.parent / "state", sums=False)
            kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
            wider = " use precision bf16," * (self.precision == "fp16")
            mend = f"lower the learning rate,{wider} or look at the samples named in {self.path}"
            tqdm.write(f"error: {count} steps in a row were not finite; {kept}; {mend}", file=sys.stderr)
        raise Diverged(1)


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
