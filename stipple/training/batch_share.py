"""Splits a global batch over processes and micro-batches, so that neither number changes the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stipple.training.trainer_config import TrainerConfig
from stipple_core.data.order import Order


@dataclass(frozen=True)
class BatchShare:
    """The share of this process in each global batch. Raises ValueError if the batch can't be split evenly."""

    config: TrainerConfig
    rank: int
    world: int

    def __post_init__(self):
        batch, size = self.config.batch_size, self.micro_batch_size
        if batch % (size * self.world):
            raise ValueError(
                f"trainer.batch_size {batch} is not a multiple of {self.world} processes x "
                f"micro_batch_size {size}; use {size * self.world} or a multiple"
            )

    @property
    def micro_batch_size(self) -> int:
        """Images per process at a time."""
        return self.config.micro_batch_size or max(1, self.config.batch_size // self.world)

    @property
    def accumulation(self) -> int:
        """Micro-batches per process and optimizer step."""
        return self.config.batch_size // (self.micro_batch_size * self.world)

    def positions(self, micro: int) -> list[int]:
        """The positions of the samples of a micro-batch in the global batch."""
        first = (micro * self.world + self.rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))

    def order(self, size: int, seed: int, step: int, buckets: Sequence[int] | None) -> Order:
        """The share of this process in the order over `size` records, from `step` on."""
        batch, steps = self.config.batch_size, self.config.steps
        return Order(size, batch, self.micro_batch_size, self.rank, self.world, seed, step, steps, buckets)
