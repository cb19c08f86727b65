"""The trainer: processes, precision, accumulation, progress, metrics, checkpoints and exact resume.

The training commands contain the loop. The trainer is the machinery around it, independent of the model:

    for batch in trainer.steps(loader):
        trainer.update(loss, optimizer)
        trainer.log(loss=loss)

One iteration is one micro-batch; `batch_size / (micro_batch_size * processes)` of them make one optimizer step.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn
from tqdm import tqdm

from stipple.training.bad_steps import BadSteps
from stipple.training.batch_share import BatchShare
from stipple.training.checkpoints import Checkpoints, SaveModel
from stipple.training.distributed import fsdp
from stipple.training.distributed.collective import on_main
from stipple.training.distributed.wrapped_networks import WrappedNetworks
from stipple.training.optimization.ema import Ema
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.optimization.update_rules import OptimizerConfig
from stipple.training.run.metrics import Metrics, drop_lines_after, flat
from stipple.training.run.run_folder import RunFolder
from stipple.training.run.signals import Signals
from stipple.training.run_state import RunState, Watched
from stipple.training.trainer_config import TrainerConfig, make_accelerator
from stipple_core.data.order import Order

T = TypeVar("T")


class Stopped(SystemExit):
    """Ends a run before its last step, after everything was saved."""


class Trainer:
    """The machinery of one run in one folder, for all training commands.

    Args:
        config: length, batch size, checkpoints and precision.
        folder: the run folder, `runs/NAME`.
        settings: the whole config of the run as plain values, for the trackers.
        product: the folder in the run folder that `save_model` writes.

    Raises:
        ValueError: the batch can't be split evenly.
    """

    def __init__(self, config: TrainerConfig, folder: str | Path, settings: dict[str, Any], product: str = "model"):
        self._began, self._signals = time.monotonic(), Signals()
        weakref.finalize(self, self._signals.close).atexit = False  # also if the loop never starts
        self.config, self.folder, self.step = config, RunFolder(folder, config.keep, product), 0
        partitions = fsdp.requested()  # before accelerate reads the environment
        self.accelerator = make_accelerator(config, folder)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.share = BatchShare(config, self.rank, self.world)
        self.accumulation = self.share.accumulation
        self.micro = 0  # finished micro-batches of the current optimizer step
        path = self.folder.path / "metrics.jsonl" if self.is_main else None
        self.metrics = Metrics(path, self.accelerator, config.log_every)
        path = self.folder.path / "bad_steps.jsonl" if self.is_main else None
        self._bad_steps = BadSteps(path, self.device, self.world, config.max_bad_steps, config.precision)
        self._run_state = RunState()
        self._networks = WrappedNetworks(self.accelerator, config.compile, partitions)
        self._checkpoints = Checkpoints(self.folder, self._run_state, self._networks, self.metrics, self.is_main)
        self._averages: list[tuple[Optimizer, Ema]] = []
        self._settings = settings

    # -- registration --------------------------------------------------------------------------------------------------

    def network(self, name: str, model: nn.Module, may_partition: bool = False) -> nn.Module:
        """Register a trained model and move it to the device; returns it wrapped for several processes.

        If `accelerate launch` requests FSDP and `may_partition` allows it, the model itself is partitioned: then only
        its forward may be called, and a `whole` copy is needed for everything else. Other models are replicated (DDP).
        """
        network, self._run_state[name] = self._networks.add(model, may_partition)
        return network

    def whole(self, model: nn.Module, saved: bool = False) -> nn.Module | None:
        """A model with all its weights: itself, or a copy of a partitioned one. Every process has to call it.

        With `saved`, the copy is on the CPU of the main process; the others get None.
        """
        device, wanted = ("cpu", self.is_main) if saved else (self.device, True)
        return self._networks.whole(model, device, wanted)

    def optimizer(
        self, name: str, modules: Iterable[nn.Module], config: OptimizerConfig, averages: Iterable[Ema] = ()
    ) -> Optimizer:
        """Register an optimizer over unwrapped models; moving averages are updated after its steps."""
        optimizer = Optimizer(modules, config, self.config.precision == "fp16", name)
        self._run_state[name] = optimizer
        for i, ema in enumerate(averages):
            self._run_state[f"{name}_ema{i}"] = ema
            self._averages.append((optimizer, ema))
        return optimizer

    def keep(self, name: str, part: Any) -> None:
        """Register anything else that has state_dict() and load_state_dict(), to be saved and restored."""
        self._run_state[name] = part

    def watch(self, name: str, value: str) -> None:
        """Check that a value the run depends on, such as a hash of its data, is the same on all processes.

        If it changed when a run is resumed, a warning is printed.

        Raises:
            ValueError: the processes have different values.
        """
        if broadcast_object_list([value])[0] != value:
            raise ValueError(
                f"process {self.rank} has other {name} than process 0; check that nothing is writing to them"
            )
        self._run_state[name] = Watched(name, value, self.print)

    @contextmanager
    def holding_folder(self) -> Iterator[None]:
        """Within the block, no other run can use the folder; afterwards it is removed again if nothing was written.

        Raises:
            ValueError: another run holds the folder; on every process.
        """
        on_main(self.folder.take, self.is_main)
        try:
            yield
        finally:
            if self.is_main:
                self.folder.leave()

    def resume(self) -> None:
        """Lock the run folder and restore its newest valid checkpoint, if any; call it after everything is registered.

        Before this call, nothing is written except within `holding_folder`, so an invalid run leaves no files behind.

        Raises:
            ValueError: another run holds the folder, or the checkpoint does not fit this run.
        """
        self.step = self._checkpoints.resume(self.config.resume, self.print)
        if self.is_main:
            drop_lines_after(self.folder.path / "bad_steps.jsonl", self.step)
        if self.config.trackers:
            self.accelerator.init_trackers(self.folder.path.name, config=flat(self._settings))

    # -- the loop -----------------------------------------------------------------------------------------------------

    def steps(
        self,
        loader: Iterable[T],
        save_model: SaveModel | None = None,
        names: Callable[[T], Sequence[str]] = lambda batch: (),
    ) -> Iterator[T]:
        """Yield micro-batches until the last step; between steps, save, log, and stop if requested.

        Args:
            loader: yields micro-batches, from `self.step` on.
            save_model: writes the model to a folder, on the main process, at each save. If a network is partitioned, it
                is called with None on the other processes, to gather the weights.
            names: returns the names of the samples of a micro-batch, for messages.
        """
        if self.step >= self.config.steps:  # the run may have been killed after the last checkpoint, before its model
            self._checkpoints.finish(self.step, save_model)
        with self._progress() as bar, self._signals as signals:
            try:
                for batch in loader:
                    self._networks.synchronise(self.last_micro)
                    if self.micro == 0:
                        self._bad_steps.begin(self._networks.buffers())
                    self._bad_steps.add_samples(names(batch))
                    yield batch
                    self.micro += 1
                    if self.micro == self.accumulation:
                        self._bad_steps.end()
                        self.micro, self.step = 0, self.step + 1
                        self._end_step(bar, signals, save_model)
            finally:
                self.accelerator.end_training()

    def update(self, loss: torch.Tensor, optimizer: Optimizer) -> None:
        """Backpropagate a scalar loss; after the last micro-batch of a step, clip, update weights and moving averages.

        If a loss or the gradient is not finite on any process, the step is skipped (`step_skipped`).

        Raises:
            Diverged: `max_bad_steps` bad steps in a row.
        """
        optimizer.backward(loss / self.accumulation)
        self._bad_steps.add_loss(optimizer.name, loss)
        if not self.last_micro:
            return
        norm = optimizer.gradient_norm()
        if not self._bad_steps.passes(optimizer.name, norm):
            return self._bad_steps.skip(self.step + 1, optimizer, norm)
        optimizer.step(self.step, self.config.steps, norm)
        self.log(**{f"{optimizer.name.removesuffix('optimizer')}grad_norm": norm})
        for owner, ema in self._averages:
            if owner is optimizer:
                ema.update()

    def log(self, **values: torch.Tensor | float) -> None:
        """Log values, averaged over micro-batches, processes and `log_every` steps, to metrics.jsonl and trackers."""
        self.metrics.add(values)

    def record(self, **values: float) -> None:
        """Write values that are measured once, such as a validation loss; only the main process writes."""
        self.metrics.write(self.step + 1, values)

    def positions(self) -> list[int]:
        """The positions of the samples of this micro-batch in the global batch, which address their random numbers."""
        return self.share.positions(self.micro)

    def order(self, size: int, seed: int, buckets: Sequence[int] | None = None) -> Order:
        """The share of this process in the training order over `size` records, from this step on; see `Order`."""
        return self.share.order(size, seed, self.step, buckets)

    def sample_path(self) -> Path:
        """The path of a sample image of this step."""
        path = self.folder.path / "samples" / f"step-{self.step + 1:07d}.png"
        path.parent.mkdir(exist_ok=True)
        return path

    @property
    def partitions(self) -> bool:
        """Whether networks that allow it are partitioned over the processes (FSDP)."""
        return self._networks.partitions

    @property
    def step_skipped(self) -> bool:
        """Whether an update of this step was skipped; then other state must not be updated from the step either."""
        return self._bad_steps.step_skipped

    @property
    def last_micro(self) -> bool:
        """Whether this micro-batch is the last of its optimizer step."""
        return self.micro == self.accumulation - 1

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes."""
        return self.accelerator.reduce(value.clone(), "sum")

    def from_main(self, value: torch.Tensor) -> torch.Tensor:
        """The main process's tensor, on every process."""
        return broadcast(value.clone())

    def due(self, every: int) -> bool:
        """Whether an action each `every` optimizer steps (0: never) is due at the end of this iteration."""
        return self.last_micro and every > 0 and ((self.step + 1) % every == 0 or self.step + 1 == self.config.steps)

    def save(self, save_model: SaveModel | None = None) -> None:
        """Write state/step-N atomically, then the model folder, then remove old checkpoints."""
        self._checkpoints.save(self.step, save_model)

    def print(self, text: str) -> None:
        """Print a line below the progress bar, on the main process only."""
        if self.is_main:
            try:
                tqdm.write(text)
            except BrokenPipeError:  # who reads the output has ended, as in `stipple train | head`: train on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # -- internals ----------------------------------------------------------------------------------------------------

    def _progress(self) -> tqdm:
        images = {"total": self.config.steps * self.config.batch_size, "initial": self.step * self.config.batch_size}
        name = self.folder.path.name
        return tqdm(**images, unit="img", unit_scale=True, desc=name, disable=not self.is_main)

    def _end_step(self, bar: tqdm, signals: Signals, save_model: SaveModel | None) -> None:
        """After an optimizer step: update progress and metrics, and save a checkpoint if one is due or requested."""
        config = self.config
        bar.update(config.batch_size)
        written = self.metrics.end_step(self.step)
        if written is not None:
            bar.set_postfix({name: f"{value:.4g}" for name, value in written.items() if "loss" in name})
        minutes = (time.monotonic() - self._began) / 60
        out_of_time = config.max_minutes is not None and minutes >= config.max_minutes
        request = signals.request(out_of_time, self.device, self.world)
        stop = request.exit_code is not None
        if self.step % config.save_every == 0 or self.step == config.steps or request.save or stop:
            self.save(save_model)
        if stop and self.step < config.steps:
            self.print(f"stopped at step {self.step} of {config.steps}; the same command resumes from here")
            raise Stopped(request.exit_code)
