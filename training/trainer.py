"""What surrounds a training step: processes, precision, accumulation, progress, metrics, checkpoints, exact resume.

The script owns the loop; the trainer owns the machinery around it and knows no model:

    for batch in trainer.steps(loader):
        trainer.update(loss, optimizer)
        trainer.log(loss=loss)

One iteration is one micro-batch; `batch_size / (micro_batch_size * processes)` of them make one optimizer step.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast, broadcast_object_list
from torch import nn
from tqdm import tqdm

from storage import checkpoint
from training.ema import Ema
from training.metrics import Metrics
from training.optimizer import Optimizer, OptimizerConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how much at a time, how often on disk."""

    steps: int = 100_000  # optimizer steps
    batch_size: int = 32  # images per optimizer step over all processes, so their number does not change the result
    micro_batch_size: int | None = None  # images per process at a time; None: batch_size / processes
    precision: str = "no"  # no (float32), bf16 or fp16; weights and moments stay float32
    compile: bool = False  # torch.compile the trained networks
    save_every: int = 1000  # optimizer steps between checkpoints
    keep: int = 2  # checkpoints kept, at least 2
    log_every: int = 20  # optimizer steps averaged into one line of metrics.jsonl
    trackers: list[str] = field(default_factory=list)  # accelerate trackers: tensorboard, wandb, ...
    workers: int = 0  # data loading processes per training process
    max_minutes: float | None = None  # save and exit 0 after this time, for queues with a limit
    max_bad_steps: int = 20  # non-finite steps in a row that end the run
    resume: bool = True  # go on from the newest valid checkpoint in the run folder; false: remove what is there

    def __post_init__(self):
        for name in ("steps", "batch_size", "save_every", "log_every", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name} {value} must be at least 1")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"trainer.precision {self.precision!r} is unknown; use no, bf16 or fp16")


class Stopped(SystemExit):
    """The run ended before its last step, with everything saved."""


class Trainer:
    """The machinery of one run in one folder; the same code for both stages.

    Args:
        config: how long, how much at a time, how often on disk.
        folder: the run folder, `runs/NAME`.
        settings: the whole run config as plain values, for the trackers.

    Raises:
        ValueError: another run holds the folder, or the batch sizes do not divide.
    """

    def __init__(self, config: TrainerConfig, folder: str | Path, settings: dict[str, Any]):
        self.config, self.folder, self.step = config, Path(folder), 0
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            log_with=config.trackers or None,
            project_dir=str(folder),
            kwargs_handlers=[
                # buffers are not broadcast: what the networks keep in them is set by the scripts, on every rank alike
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),  # rank 0 draws previews while the others wait
            ],
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.micro_batch_size = config.micro_batch_size or max(1, config.batch_size // self.world)
        self.accumulation, rest = divmod(config.batch_size, self.micro_batch_size * self.world)
        if rest or not self.accumulation:
            raise ValueError(
                f"trainer.batch_size {config.batch_size} is not a multiple of {self.world} processes x "
                f"micro_batch_size {self.micro_batch_size}; use {self.micro_batch_size * self.world} or a multiple"
            )
        self.micro = 0  # micro-batches done of the optimizer step under way
        path = self.folder / "metrics.jsonl" if self.is_main else None
        self.metrics = Metrics(path, self.accelerator, config.log_every)
        self._parts: dict[str, Any] = {}  # name -> anything with state_dict() and load_state_dict()
        self._networks: list[nn.Module] = []
        self._averages: list[tuple[Optimizer, Ema]] = []
        self._signal: int | None = None
        self._settings = settings
        self._lock = self._take_folder()

    # -- what a run consists of ---------------------------------------------------------------------------------------

    def network(self, name: str, model: nn.Module) -> nn.Module:
        """Register a trained model, move it to the device; returns it wrapped for several processes."""
        model.to(self.device)
        if self.config.compile:
            model.compile()
        self._parts[name] = model
        with warnings.catch_warnings():  # torch deprecates the option that keeps DDP from broadcasting buffers
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = self.accelerator.prepare_model(model)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # channels_last
        self._networks.append(wrapped)
        return wrapped

    def optimizer(
        self, name: str, modules: Iterable[nn.Module], config: OptimizerConfig, averages: Iterable[Ema] = ()
    ) -> Optimizer:
        """Register an optimizer over the plain models; the moving averages follow its updates."""
        optimizer = Optimizer(modules, config, self.config.precision == "fp16", name)
        self._parts[name] = optimizer
        for i, ema in enumerate(averages):
            self._parts[f"{name}_ema{i}"] = ema
            self._averages.append((optimizer, ema))
        return optimizer

    def keep(self, name: str, part: Any) -> None:
        """Save and restore anything else that has state_dict() and load_state_dict()."""
        self._parts[name] = part

    def watch(self, name: str, value: str) -> None:
        """Make sure that something the run depends on, such as its data, is the same everywhere and after a resume.

        Raises:
            ValueError: the processes do not have the same value.
        """
        if broadcast_object_list([value])[0] != value:
            raise ValueError(f"process {self.rank} found other {name} than process 0; is somebody writing there?")
        self._parts[name] = _Watched(name, value, self.print)

    def resume(self) -> None:
        """Take up the newest valid checkpoint of the run folder, if any; call when all parts are registered.

        Raises:
            ValueError: the checkpoint is not of these parts.
        """
        answer: list[Path | None] = [None]
        if self.is_main:
            if not self.config.resume:  # else what is saved now would be pruned as older than what it replaces
                shutil.rmtree(self.folder / "state", ignore_errors=True)
            for folder in (self.folder, self.folder / "state"):
                checkpoint.clear_temporaries(folder)
            answer = [checkpoint.newest_valid(self.folder / "state")]
        found = broadcast_object_list(answer)[0]
        if found is None:
            self.metrics.rewind(0)
        else:
            state = checkpoint.load_state(found)
            for name, part in self._parts.items():
                try:
                    part.load_state_dict(state["parts"][name])
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, KeyError) as error:
                    raise ValueError(
                        f"{found} is of another configuration ({name} does not fit: {str(error).splitlines()[0]}); "
                        "choose another `run`, or begin this one anew with --no-resume, which removes what is there"
                    ) from error
            self.step = state["step"]
            self.metrics.rewind(self.step, state["window"])
            self.print(f"resumed from {found}")
        if self.config.trackers:
            self.accelerator.init_trackers(self.folder.name, config=_flat(self._settings))

    # -- the loop -----------------------------------------------------------------------------------------------------

    def steps(self, loader: Iterable[T], save_model: Callable[[Path], None] | None = None) -> Iterator[T]:
        """Yield micro-batches until the last step; between steps save, log, and stop when asked to.

        `loader` starts at `self.step`; `save_model` writes the model to a folder, on the main process, at each save.
        """
        config, started = self.config, time.monotonic()
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        if self.step >= config.steps and self.is_main:  # the end may have come between the last state and the rest
            if save_model is not None:
                checkpoint.write_folder(self.folder / "model", save_model)
            checkpoint.prune(self.folder / "state", config.keep)
        total, first = config.steps * config.batch_size, self.step * config.batch_size
        bar = tqdm(
            total=total, initial=first, unit="img", unit_scale=True, desc=self.folder.name, disable=not self.is_main
        )
        try:
            for batch in loader:
                self._synchronise_gradients(self.last_micro)
                yield batch
                self.micro += 1
                if self.micro < self.accumulation:
                    continue
                self.micro, self.step = 0, self.step + 1
                bar.update(config.batch_size)
                written = self.metrics.end_step(self.step)
                if written is not None:
                    bar.set_postfix({name: f"{value:.4g}" for name, value in written.items() if "loss" in name})
                limit = config.max_minutes
                stop = self._stop(limit is not None and time.monotonic() - started >= 60 * limit)
                if self.step % config.save_every == 0 or self.step == config.steps or stop is not None:
                    self.save(save_model)
                if stop is not None and self.step < config.steps:
                    self.print(f"stopped at step {self.step} of {config.steps}; the same command goes on from here")
                    raise Stopped(128 + stop if stop else 0)
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.accelerator.end_training()

    def update(self, loss: torch.Tensor, optimizer: Optimizer) -> None:
        """Backward through a scalar loss; at the last micro-batch of a step: clip, step, moving average."""
        optimizer.backward(loss / self.accumulation)
        if not self.last_micro:
            return
        norm, finite = optimizer.step(self.step, self.config.steps)
        if not finite:
            return self._bad_step(norm, optimizer)
        self.log(**{f"{optimizer.name.removesuffix('optimizer')}grad_norm": norm})
        for owner, ema in self._averages:
            if owner is optimizer:
                ema.update()

    def log(self, **values: torch.Tensor | float) -> None:
        """Average these over micro-batches, processes and `log_every` steps into metrics.jsonl and the trackers."""
        self.metrics.add(values)

    def record(self, **values: float) -> None:
        """Write values measured once, such as a validation, at this step; the main process writes."""
        self.metrics.write(self.step + 1, values)

    def positions(self) -> list[int]:
        """Where the samples of this micro-batch stand in the global batch of this step: the address of their draws."""
        first = (self.micro * self.world + self.rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))

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
        """Whether something done each `every` optimizer steps (0: never) is due at the end of this iteration."""
        return self.last_micro and every > 0 and ((self.step + 1) % every == 0 or self.step + 1 == self.config.steps)

    def save(self, save_model: Callable[[Path], None] | None = None) -> None:
        """Write state/step-N atomically, then the model folder, then prune."""
        window = self.metrics.window()  # averaged over processes, so every one takes part
        if self.is_main:
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            state = {"step": self.step, "window": window, "parts": parts}
            folder = self.folder / "state" / f"step-{self.step:07d}"
            checkpoint.write_folder(folder, lambda path: checkpoint.save_state(path, state))
            if save_model is not None:
                checkpoint.write_folder(self.folder / "model", save_model)
            checkpoint.prune(self.folder / "state", self.config.keep)
        self.accelerator.wait_for_everyone()

    def print(self, text: str) -> None:
        """A line for the person watching, once, below the progress bar."""
        if self.is_main:
            tqdm.write(text)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _synchronise_gradients(self, on: bool) -> None:
        for network in self._networks:
            if isinstance(network, nn.parallel.DistributedDataParallel):
                network.require_backward_grad_sync = on  # what DDP.no_sync() sets, for a loop that is not a with-block

    def _bad_step(self, norm: torch.Tensor, optimizer: Optimizer) -> None:
        self.print(f"step {self.step + 1}: gradient norm {float(norm)} of {optimizer.name}; this update was left out")
        if optimizer.bad_steps >= self.config.max_bad_steps:
            raise RuntimeError(
                f"{optimizer.bad_steps} steps in a row had no finite gradient; the last good checkpoint is intact in "
                f"{self.folder / 'state'}; lower the learning rate or use precision bf16"
            )

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number

    def _stop(self, out_of_time: bool) -> int | None:
        """The signal number to stop for (0 for the time limit), None to go on.

        Several processes must stop at the same step, so they ask each other.
        """
        wanted = self._signal if self._signal is not None else 0 if out_of_time else -1
        if self.world > 1:
            answer = torch.tensor(wanted, device=self.device)
            torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
            wanted = int(answer)
        return wanted if wanted >= 0 else None

    def _take_folder(self) -> IO | None:
        if not self.is_main:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = open(self.folder / ".lock", "w")  # noqa: SIM115  (held open, and so locked, for the life of the process)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.folder} is in use by another run; wait for it or choose another `run`") from None
        return lock


@dataclass(frozen=True)
class _Watched:
    """A part of the state that is only compared."""

    name: str
    value: str
    say: Callable[[str], None]

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        if state["value"] != self.value:
            self.say(f"warning: the {self.name} changed since the run was stopped: not the same run any more")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c: value`, with the value types that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
    return flat
