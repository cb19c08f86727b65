"""The order of training: which sample stands at which place of which global batch, by seed and step alone."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stipple_core.randomness import generator


class Address(NamedTuple):
    """The `index`-th record in the `epoch`-th pass over the data: what caption, crop and flip are drawn from."""

    epoch: int
    index: int


class BucketSchedule:
    """Which bucket each optimizer step's global batch is of: a function of (seed, step), in closed form.

    Within r rounds a bucket of n records has had floor((r n + o) / B) batches of B, o in [0, B) drawn once: as many as
    it has records to fill, so that no record is seen more often than another, and of a bucket with fewer than B
    records not every round has one. A round's batches are shuffled.

    Args:
        sizes: records of each bucket, each at least 1.
        global_batch: B.
        seed: the run's seed.
    """

    def __init__(self, sizes: Sequence[int], global_batch: int, seed: int = 0):
        self.sizes, self.global_batch, self.seed = list(sizes), global_batch, seed
        draws = (generator(seed, "bucket", bucket) for bucket in range(len(self.sizes)))
        self.starts = [int(torch.randint(global_batch, (), generator=draw)) for draw in draws]
        self._first, self._turns, self._batches = 0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)

    def __call__(self, step: int) -> tuple[int, int]:
        """The bucket whose turn it is, and how many batches it has had before."""
        if not self._first <= step < self._first + len(self._turns):
            self._open(step)
        return int(self._turns[step - self._first]), int(self._batches[step - self._first])

    def _had(self, rounds: int) -> list[int]:
        return [(rounds * n + o) // self.global_batch for n, o in zip(self.sizes, self.starts, strict=True)]

    def _open(self, step: int) -> None:
        """Draw the turns of the round that the step is in."""
        last = (step + 1 + len(self.sizes)) * self.global_batch // sum(self.sizes) + 1  # surely after the step
        number = bisect.bisect_right(range(last + 1), step, key=lambda rounds: sum(self._had(rounds))) - 1
        before, after = self._had(number), self._had(number + 1)
        turns = np.repeat(np.arange(len(self.sizes)), np.subtract(after, before))
        shuffled = torch.randperm(len(turns), generator=generator(self.seed, "turns", number)).numpy()
        self._first, self._turns, self._batches = sum(before), turns[shuffled], np.empty_like(turns)
        counted = [np.arange(*pair) for pair in zip(before, after, strict=True)]
        self._batches[np.argsort(self._turns, kind="stable")] = np.concatenate(counted)


class Order:
    """A batch sampler: lists of Address for one process, micro-batch by micro-batch.

    The stream is endless and the same for any split: place p = step * global_batch + j holds the (p mod size)-th
    record of the permutation of epoch p // size. Micro-step m of process `rank` takes the `micro_batch` places from
    j = (m * world + rank) * micro_batch on; so one process with 2 micro-batches sees what 2 processes see, and a run
    resumes at any step, on any number of processes.

    With buckets every global batch is of one bucket; each bucket has such a stream of its own, and `BucketSchedule` says whose
    turn it is. One bucket for all gives the same order as none.

    Args:
        size: number of records.
        global_batch: samples per optimizer step, over all processes and micro-steps.
        micro_batch: samples per process and forward pass.
        rank, world: this process, and how many there are.
        seed: the run's seed.
        start_step: the first optimizer step to yield, when resuming.
        steps: the optimizer step to stop before; None: endless.
        buckets: the number of each record's bucket.

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
        self.turns = BucketSchedule(self.sizes, global_batch, seed)
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
        bucket, batch = self.turns(step) if self.members is not None else (0, step)
        first = batch * self.global_batch + (micro_step * self.world + self.rank) * self.micro_batch
        return [self._address(bucket, place) for place in range(first, first + self.micro_batch)]

    def _address(self, bucket: int, place: int) -> Address:
        epoch, position = divmod(place, self.sizes[bucket])
        if (bucket, epoch) not in self._permutations:
            for old in [key for key in self._permutations if key[0] == bucket and key[1] != epoch - 1]:
                del self._permutations[old]  # all but the last one: batches span epochs
            named = (epoch,) if bucket == 0 else (epoch, bucket)
            order = torch.randperm(self.sizes[bucket], generator=generator(self.seed, "order", *named)).numpy()
            self._permutations[bucket, epoch] = order if self.members is None else self.members[bucket][order]
        return Address(epoch, int(self._permutations[bucket, epoch][position]))
