"""The order of training samples: which sample is at which position of which global batch, from seed and step alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stipple_core.randomness import generator


class Address(NamedTuple):
    """The `index`-th record in the `epoch`-th pass over the data. Caption, crop and flip are drawn from it."""

    epoch: int
    index: int


class BucketSchedule:
    """The bucket of each optimizer step's global batch: a function of (seed, step), in closed form.

    After r rounds, a bucket of n records has had floor((r n + o) / B) batches of B samples, where o in [0, B) is drawn
    once. So each record is used equally often, and a bucket with fewer than B records is skipped in some rounds. The
    batches of a round are shuffled.

    Args:
        sizes: the number of records in each bucket, at least 1.
        global_batch: B, samples per optimizer step.
        seed: the run's seed.
    """

    def __init__(self, sizes: Sequence[int], global_batch: int, seed: int = 0):
        self.sizes, self.global_batch, self.seed = list(sizes), global_batch, seed
        draws = (generator(seed, "bucket", bucket) for bucket in range(len(self.sizes)))
        self.starts = [int(torch.randint(global_batch, (), generator=draw)) for draw in draws]
        self._first, self._buckets, self._batches = 0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def __call__(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and how many batches the bucket has had before."""
        if not self._first <= step < self._first + len(self._buckets):
            self._draw_round(step)
        return int(self._buckets[step - self._first]), int(self._batches[step - self._first])

    def _batches_after(self, rounds: int) -> list[int]:
        return [(rounds * n + o) // self.global_batch for n, o in zip(self.sizes, self.starts, strict=True)]

    def _draw_round(self, step: int) -> None:
        """Draw the buckets of the round that contains the step."""
        last = (step + 1 + len(self.sizes)) * self.global_batch // sum(self.sizes) + 1  # a round after the step
        number = bisect.bisect_right(range(last + 1), step, key=lambda rounds: sum(self._batches_after(rounds))) - 1
        before, after = self._batches_after(number), self._batches_after(number + 1)
        buckets = np.repeat(np.arange(len(self.sizes)), np.subtract(after, before))
        shuffled = torch.randperm(len(buckets), generator=generator(self.seed, "turns", number)).numpy()
        self._first, self._buckets, self._batches = sum(before), buckets[shuffled], np.empty_like(buckets)
        counted = [np.arange(*pair) for pair in zip(before, after, strict=True)]
        self._batches[np.argsort(self._buckets, kind="stable")] = np.concatenate(counted)


class Order:
    """A batch sampler: yields the addresses of one process's micro-batches.

    The stream of samples is endless and does not depend on the number of processes. Position p = step * global_batch +
    j has the (p mod size)-th record of the permutation of epoch p // size. Micro-step m of process `rank` takes the
    `micro_batch` positions from j = (m * world + rank) * micro_batch on. So one process with 2 micro-batches sees the
    same samples as 2 processes, and a run can be resumed at any step with any number of processes.

    With buckets, each global batch comes from one bucket, which `BucketSchedule` selects, and each bucket has its own
    stream. A single bucket gives the same order as no buckets.

    Args:
        size: the number of records.
        global_batch: samples per optimizer step, over all processes and micro-steps.
        micro_batch: samples per process and forward pass.
        rank, world: the number of this process, and of all processes.
        seed: the run's seed.
        start_step: the first optimizer step to yield, when resuming.
        steps: the optimizer step to stop before. None: endless.
        buckets: the number of each record's bucket.

    Raises:
        ValueError: global_batch is not a multiple of micro_batch * world, or a size is below 1.
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
        buckets: Sequence[int] | None = None,
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
        of = () if buckets is None else np.asarray(buckets)
        members = [np.flatnonzero(of == bucket) for bucket in np.unique(of)]  # indices of records
        self.members = members if len(members) > 1 else None  # None: all of them
        self.sizes = [len(each) for each in members] if len(members) > 1 else [size]
        self.schedule = BucketSchedule(self.sizes, global_batch, seed)
        self._permutations: dict[tuple[int, int], np.ndarray] = {}  # by bucket and epoch

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
        bucket, batch = self.schedule(step) if self.members is not None else (0, step)
        first = batch * self.global_batch + (micro_step * self.world + self.rank) * self.micro_batch
        return [self._address(bucket, position) for position in range(first, first + self.micro_batch)]

    def _address(self, bucket: int, position: int) -> Address:
        epoch, position = divmod(position, self.sizes[bucket])
        if (bucket, epoch) not in self._permutations:
            for old in [key for key in self._permutations if key[0] == bucket and key[1] != epoch - 1]:
                del self._permutations[old]  # keep the previous epoch: batches span two epochs
            named = (epoch,) if bucket == 0 else (epoch, bucket)
            order = torch.randperm(self.sizes[bucket], generator=generator(self.seed, "order", *named)).numpy()
            self._permutations[bucket, epoch] = order if self.members is None else self.members[bucket][order]
        return Address(epoch, int(self._permutations[bucket, epoch][position]))
