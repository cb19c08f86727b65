"""The order of training: which sample stands at which place of which global batch, by seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from storage.randomness import generator


class Address(NamedTuple):
    """The `index`-th record in the `epoch`-th pass over the data: what caption, crop and flip are drawn from."""

    epoch: int
    index: int


class Order:
    """A batch sampler: lists of Address for one process, micro-batch by micro-batch.

    The stream is endless and the same for any split: place p = step * global_batch + j holds the (p mod size)-th
    record of the permutation of epoch p // size. Micro-step m of process `rank` takes the `micro_batch` places from
    j = (m * world + rank) * micro_batch on; so one process with 2 micro-batches sees what 2 processes see, and a run
    resumes at any step, on any number of processes.

    Args:
        size: number of records.
        global_batch: samples per optimizer step, over all processes and micro-steps.
        micro_batch: samples per process and forward pass.
        rank, world: this process, and how many there are.
        seed: the run's seed.
        start_step: the first optimizer step to yield, when resuming.
        steps: the optimizer step to stop before; None: endless.

    Raises ValueError if global_batch is no multiple of micro_batch * world, or there is nothing to order.
    """

    def __init__(
        self,
        size: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start_step: int = 0,
        steps: int | None = None,
    ):
        if size < 1 or micro_batch < 1 or global_batch < 1:
            raise ValueError(f"{size} records in batches of {global_batch} and {micro_batch}: all must be at least 1")
        if global_batch % (micro_batch * world):
            raise ValueError(
                f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x {world} processes; "
                f"use {max(1, global_batch // (micro_batch * world)) * micro_batch * world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} processes")
        self.size, self.global_batch, self.micro_batch = size, global_batch, micro_batch
        self.rank, self.world, self.seed = rank, world, seed
        self.start_step, self.steps = start_step, steps
        self.accumulation = global_batch // (micro_batch * world)
        self._permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("an endless order has no length")
        return max(0, self.steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Address]]:
        step = self.start_step
        while self.steps is None or step < self.steps:
            for micro_step in range(self.accumulation):
                yield self.micro_batch_at(step, micro_step)
            step += 1

    def micro_batch_at(self, step: int, micro_step: int) -> list[Address]:
        """The addresses of this process's `micro_step`-th micro-batch of an optimizer step."""
        first = step * self.global_batch + (micro_step * self.world + self.rank) * self.micro_batch
        return [self._address(place) for place in range(first, first + self.micro_batch)]

    def _address(self, place: int) -> Address:
        epoch, position = divmod(place, self.size)
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}  # batches span epochs
            order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch))
            self._permutations[epoch] = order.numpy()
        return Address(epoch, int(self._permutations[epoch][position]))
