"""Data loaders whose workers leave signals and the global random state alone."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from stipple_core.data.dataset import collate
from stipple_core.data.order import Order


def make_loader(
    dataset: Dataset, order: Order, workers: int = 0, collate: Callable[[Sequence[Any]], Any] = collate
) -> DataLoader:
    """Make a loader of the micro-batches of one process. It does not use the global random state.

    Args:
        dataset: indexed by `Address`.
        order: a batch sampler.
        workers: worker processes. 0 loads in this process.
        collate: combines samples to a batch.
    """
    if workers:
        atexit.unregister(_end_workers)  # register it only once
        atexit.register(_end_workers)
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals if workers else None,
        generator=torch.Generator(),  # else each iterator draws a seed from the global generator
        prefetch_factor=4 if workers else None,
    )


def _ignore_signals(worker: int) -> None:
    """Ignore signals sent to the process group: workers must outlive the last step of the trainer."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill the remaining workers at exit: they ignore the SIGTERM that multiprocessing sends them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error for each
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
