"""The config of the trainer: length, batch size, checkpoints and precision of a run; and its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

MAX_TIMEOUT = 525_600  # minutes


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length, batch size, checkpoints and precision of a run."""

    steps: int = 100_000  # optimizer steps
    batch_size: int = 32  # images per optimizer step over all processes, so their number does not change the result
    micro_batch_size: int | None = None  # images per process at a time; None: batch_size / processes
    precision: str = "no"  # no (float32), bf16 or fp16; weights and moments stay float32
    compile: bool = False  # torch.compile the trained networks
    save_every: int = 1000  # optimizer steps between checkpoints
    keep: int = 2  # checkpoints kept, at least 2
    log_every: int = 20  # optimizer steps averaged into one line of metrics.jsonl
    trackers: list[str] = field(default_factory=list)  # of accelerate: tensorboard, wandb, ...
    workers: int = 0  # data loading processes per training process
    max_minutes: float | None = None  # save and exit with code 0 after so long, for queues with a time limit
    timeout_minutes: float = 60  # processes wait so long for each other, also while the first one draws samples
    max_bad_steps: int = 20  # non-finite steps in a row that end the run
    resume: bool = True  # from the newest valid checkpoint in the run folder; false: remove its checkpoints

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f"trainer.workers {self.workers} must be at least 0; 0 loads in the training process")
        for name in ("steps", "batch_size", "save_every", "log_every", "micro_batch_size", "max_bad_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name} {value} must be at least 1")
        if self.keep < 2:
            raise ValueError(f"trainer.keep {self.keep} must be at least 2, because one may be damaged; use 2")
        if self.max_minutes is not None and self.max_minutes < 0:
            raise ValueError(f"trainer.max_minutes {self.max_minutes} must be at least 0; 0 makes one step")
        if not 0 < self.timeout_minutes <= MAX_TIMEOUT:
            rule = f"must be above 0 and at most {MAX_TIMEOUT}, a year; use 60"
            raise ValueError(f"trainer.timeout_minutes {self.timeout_minutes:g} {rule}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"trainer.precision {self.precision!r} is unknown; use no, bf16 or fp16")


def make_accelerator(config: TrainerConfig, folder: str | Path) -> Accelerator:
    """Connect the processes, and choose their devices and precision."""
    # buffers are not broadcast, because they are equal on all processes
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))
    return Accelerator(
        mixed_precision=config.precision,
        log_with=config.trackers or None,
        project_dir=str(folder),
        kwargs_handlers=[parallel, timeout],
    )
