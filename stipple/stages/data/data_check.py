"""The data as it is before the first step: without pictures that can't be decoded, each in its bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object

from stipple.training.distributed.collective import ErrorSummary
from stipple.training.trainer import Trainer
from stipple_core.data.records.buckets import Buckets, assign, bucket_shapes
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, Records
from stipple_core.data.verify import Inspection, InspectionCache, drop_unusable, inspect, read_sizes


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What a run has to learn from, the same on every process."""

    records: Records  # those that can be used
    train: Buckets | None = None  # of records.train; None: all are square
    held_out: Buckets | None = None  # of records.validation
    memory: InspectionCache | None = None  # to be written when the run begins; None: nothing was verified

    @classmethod
    def of(cls, records: Records, config: DataConfig, trainer: Trainer, cached: bool = False) -> DataCheck:
        """Look at what `scan` found, unless a latent cache has done so; the processes share the work.

        Raises ValueError if more than `data.max_bad_fraction` can't be used or another run holds the folder, OSError
        where the system fails.
        """
        share = trainer.rank, trainer.world
        if cached:
            return cls(records=records, held_out=bucketed(records.validation, config, share))
        if not config.verify:
            train, held_out = (bucketed(part, config, share) for part in (records.train, records.validation))
            return cls(records=records, train=train, held_out=held_out)
        with trainer.holding_folder():  # to which a verification that takes long writes
            memory = InspectionCache(str(trainer.folder.path), trainer.rank)
            train = together(lambda part: inspect(part, memory, share), records.train, share)
            held_out = together(lambda part: inspect(part, memory, share), records.validation, share)
        records = drop_unusable(records, train, held_out, config)
        buckets = [in_buckets([look for look in looks if not look.reason], config) for looks in (train, held_out)]
        return cls(records=records, train=buckets[0], held_out=buckets[1], memory=memory)


def bucketed(records: Sequence[Record], config: DataConfig, share: tuple[int, int]) -> Buckets | None:
    """The bucket of each record, by its header, if there are buckets; the processes share the work."""
    if config.buckets is None:
        return None
    return in_buckets(together(lambda part: read_sizes(part, share), records, share), config)


def in_buckets(looks: Sequence[Inspection], config: DataConfig) -> Buckets | None:
    """The bucket of each picture that was looked at, if there are buckets."""
    if config.buckets is None:
        return None
    shapes = bucket_shapes(config.image_size, config.buckets)
    return assign([(look.width, look.height) for look in looks], shapes)


def together(
    look: Callable[[Sequence[Record]], list[Inspection]], records: Sequence[Record], share: tuple[int, int]
) -> list[Inspection]:
    """The looks of all processes, in order of the records; an OSError of one is raised in all."""
    rank, world = share
    try:
        answer = (rank, look(records), None)
    except OSError as error:
        answer = (rank, [], ErrorSummary.of(error))
    looks: list[Inspection] = [Inspection()] * len(records)
    for each, own, problem in gather_object([answer]):
        if problem is not None:
            raise problem.error(OSError)
        looks[each::world] = own
    return looks
