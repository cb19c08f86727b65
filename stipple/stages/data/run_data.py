"""The data of a run: which pictures it trains on, which are held out, and which could not be used."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stipple.stages.data.data_check import DataCheck
from stipple.stages.data.run_settings import changes
from stipple.training.distributed.collective import on_main
from stipple.training.trainer import Trainer
from stipple_core.config import one_line_errors, save_config
from stipple_core.data.dataset import Batch, Hint, ImageDataset, TooManyBad, collate
from stipple_core.data.loader import make_loader
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import (
    RecordList,
    Records,
    Skip,
    fingerprint,
    merge_skipped,
    read_skipped,
    totals,
    write_skipped,
)
from stipple_core.data.records.rows import maps_fingerprint
from stipple_core.latent_cache.reader import CachedBatch, CachedLatents, DamagedCache, cached_collate


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run trains on and what it is measured on."""

    records: Records  # without those that the cache found unusable
    dataset: ImageDataset | CachedLatents  # of records.train
    held_out: ImageDataset  # of records.validation, cropped in the center
    squares: ImageDataset  # of records.train, all of one shape, whatever the buckets
    data_check: DataCheck
    skipped: Path  # the file that says what was skipped, and why

    @classmethod
    def open(
        cls,
        config: DataConfig,
        data_check: DataCheck,
        seed: int,
        run: str,
        cache: CachedLatents | None = None,
        hint: Hint | None = None,
    ) -> RunData:
        """The data sets over what can be used, and over a latent cache where there is one; `hint` as ImageDataset's."""
        skipped, records = Path(run) / "skipped.jsonl", data_check.records
        if cache is not None:
            records = without_unusable(records, cache)
        squares = ImageDataset(records.train, config, seed, on_skip=str(skipped), hint=hint)
        entries = len(records.train) + len(records.validation) + len(records.skipped)
        dataset = cache or ImageDataset(records.train, config, seed, str(skipped), data_check.train, entries, hint)
        center = dataclasses.replace(config, crop="center", flip=False, max_bad_fraction=1.0)
        held_out = ImageDataset(
            records.validation, center, seed, on_skip=str(skipped), buckets=data_check.held_out, hint=hint
        )
        return cls(
            records=records, dataset=dataset, held_out=held_out, squares=squares, data_check=data_check, skipped=skipped
        )

    @property
    def examples(self) -> ImageDataset:
        """Held-out pictures, or where there are none those trained on, all of one shape."""
        held = self.held_out
        return ImageDataset(held.records, held.config, held.seed, str(self.skipped), hint=held.hint) or self.squares

    def begin(self, trainer: Trainer, config: Any) -> None:
        """Resume the run, or begin it; from here on its folder says what it was told and what it can't use.

        Of a run that goes on, what went bad on the way before stays among what was skipped.

        Raises ValueError as `Trainer.watch` and `Trainer.resume` do.
        """
        train, held_out, skipped = self.records.train, self.records.validation, self.records.skipped
        why = f" ({totals(skipped)}; reasons in {self.skipped})" if skipped else ""
        trainer.print(f"{len(train)} images, {len(held_out)} held out, {len(skipped)} skipped{why}")
        maps = self.held_out.config.maps
        told = fingerprint(train) if maps is None else f"{fingerprint(train)} {maps_fingerprint(maps, train)}"
        trainer.watch("images and captions", told)
        trainer.resume()
        if trainer.step and (told := changes(config, f"{config.run}/config.yaml")):
            trainer.print(f"warning: not the settings that the run was stopped with: {told}; not the same run any more")
        if self.data_check.memory is not None:
            self.data_check.memory.flush()

        def write() -> None:
            save_config(config, f"{config.run}/config.yaml")
            (merge_skipped if trainer.step else write_skipped)(skipped, str(self.skipped))

        on_main(write, trainer.is_main)  # and the others wait, before they append to what was skipped

    def loader(self, trainer: Trainer, seed: int) -> Iterator[Batch | CachedBatch]:
        """This process's micro-batches, from the step on at which the trainer is.

        Pictures that go bad on the way end the run in one line and exit code 2, where they become too many; so does a
        damaged latent cache.
        """
        if isinstance(self.dataset, CachedLatents):
            together, buckets = cached_collate, self.dataset.buckets()
        else:
            together, buckets = collate, None if self.data_check.train is None else self.data_check.train.of
        order = trainer.order(len(self.dataset), seed, buckets)
        try:
            yield from make_loader(self.dataset, order, trainer.config.workers, together)
        except (TooManyBad, DamagedCache) as error:
            if trainer.is_main:
                print(file=sys.stderr)  # end the line of the progress bar
            with one_line_errors():  # a worker's comes with its traceback ahead
                raise ValueError(str(error).rpartition(f"{type(error).__name__}: ")[2]) from None

    def weights(self, batch: Batch | CachedBatch) -> torch.Tensor:
        """How much the loss of each of a micro-batch's pictures counts: [B]."""
        return torch.tensor([self.records.train[index].weight for index in batch.indices.tolist()])

    def names(self, batch: Batch | CachedBatch) -> list[str]:
        """Of a micro-batch's pictures, as they were asked for, for messages."""
        return [self.records.train[index].name for index in batch.indices.tolist()]

    @contextmanager
    def reported(self, trainer: Trainer) -> Iterator[None]:
        """Say how many pictures were skipped in all, if any were, when the run ends, however it does."""
        try:
            yield
        finally:
            skips = read_skipped(str(self.skipped)) if trainer.is_main and self.skipped.exists() else []
            if skips:
                trainer.print(f"{len(skips)} skipped in all ({totals(skips)}); {self.skipped} says which, and why")


def without_unusable(records: Records, cache: CachedLatents) -> Records:
    """The records that the cache has latents of, in its order; the others count as skipped."""
    usable, path = set(cache.usable.tolist()), Path(cache.folder) / "skipped.jsonl"
    reasons = {skip.path: skip.reason for skip in read_skipped(str(path))} if path.exists() else {}
    gone = (record.name for i, record in enumerate(records.train) if i not in usable)
    skipped = [*records.skipped, *(Skip(name, reasons.get(name, "not in the latent cache")) for name in gone)]
    kept = RecordList(record for i, record in enumerate(records.train) if i in usable)
    return Records(kept, records.validation, skipped)
