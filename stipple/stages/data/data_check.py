"""The data check before the first step: drops images that can't be decoded, and assigns buckets."""

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
    """The checked data of a run, the same on every process."""

    records: Records  # the usable ones
    train: Buckets | None = None  # of records.train; None: all images are square
    held_out: Buckets | None = None  # of records.validation
    memory: InspectionCache | None = None  # of verified files, written when the run begins; None: nothing was verified

    @classmethod
    def of(cls, records: Records, config: DataConfig, trainer: Trainer, cached: bool = False) -> DataCheck:
        """Check the records that `scan` returned; the processes share the work.

        With `cached`, training images were checked when the latent cache was made.

        Raises:
            ValueError: more than `data.max_bad_fraction` can't be used, or another run holds the run folder.
            OSError: files can't be read.
        """
        share = trainer.rank, trainer.world
        if cached:
            return cls(records=records, held_out=bucketed(records.validation, config, share))
        if not config.verify:
            train, held_out = (bucketed(part, config, share) for part in (records.train, records.validation))
            return cls(records=records, train=train, held_out=held_out)
        with trainer.holding_folder():  # verification saves its progress there
            memory = InspectionCache(str(trainer.folder.path), trainer.rank)
            train = together(lambda part: inspect(part, memory, share), records.train, share)
            held_out = together(lambda part: inspect(part, memory, share), records.validation, share)
        records = drop_unusable(records, train, held_out, config)
        buckets = [in_buckets([each for each in part if not each.reason], config) for part in (train, held_out)]
        return cls(records=records, train=buckets[0], held_out=buckets[1], memory=memory)


def bucketed(records: Sequence[Record], config: DataConfig, share: tuple[int, int]) -> Buckets | None:
    """Assign each record to a bucket by the size in its header; None without buckets. The processes share the work."""
    if config.buckets is None:
        return None
    return in_buckets(together(lambda part: read_sizes(part, share), records, share), config)


def in_buckets(inspections: Sequence[Inspection], config: DataConfig) -> Buckets | None:
    """Assign each inspected image to a bucket; None without buckets."""
    if config.buckets is None:
        return None
    shapes = bucket_shapes(config.image_size, config.buckets)
    return assign([(each.width, each.height) for each in inspections], shapes)


def together(
    inspect_share: Callable[[Sequence[Record]], list[Inspection]], records: Sequence[Record], share: tuple[int, int]
) -> list[Inspection]:
    """Gather the inspections of all processes in the order of the records; an OSError of one is raised on all."""
    rank, world = share
    try:
        answer = (rank, inspect_share(records), None)
    except OSError as error:
        answer = (rank, [], ErrorSummary.of(error))
    inspections: list[Inspection] = [Inspection()] * len(records)
    for other, own, failure in gather_object([answer]):
        if failure is not None:
            raise failure.error(OSError)
        inspections[other::world] = own
    return inspections
