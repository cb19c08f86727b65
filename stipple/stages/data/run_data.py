"""The data of a run: the images it trains on, those that are held out, and those that can't be used."""

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
    """The training and validation data of a run."""

    records: Records  # without those that are missing in the latent cache
    dataset: ImageDataset | CachedLatents  # of records.train
    held_out: ImageDataset  # of records.validation, cropped in the center
    squares: ImageDataset  # of records.train, all square, even with buckets
    data_check: DataCheck
    skipped: Path  # the file that lists skipped images with reasons

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
        """Build the datasets over the usable records, or over a latent cache; `hint` is that of `ImageDataset`."""
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
        """Square images to show while training: those held out, or training images if none are."""
        held_out = self.held_out
        dataset = ImageDataset(held_out.records, held_out.config, held_out.seed, str(self.skipped), hint=held_out.hint)
        return dataset or self.squares

    def begin(self, trainer: Trainer, config: Any) -> None:
        """Start or resume the run, and write its config and its skipped images to the run folder.

        A run that is resumed keeps the images that it skipped while training.

        Raises:
            ValueError: as `Trainer.watch` and `Trainer.resume`.
        """
        train, held_out, skipped = self.records.train, self.records.validation, self.records.skipped
        why = f" ({totals(skipped)}; reasons in {self.skipped})" if skipped else ""
        trainer.print(f"{len(train)} images, {len(held_out)} held out, {len(skipped)} skipped{why}")
        maps = self.held_out.config.maps
        data_hash = fingerprint(train) if maps is None else f"{fingerprint(train)} {maps_fingerprint(maps, train)}"
        trainer.watch("images and captions", data_hash)
        trainer.resume()
        if trainer.step and (changed := changes(config, f"{config.run}/config.yaml")):
            trainer.print(f"warning: settings changed since the run was stopped: {changed}; results may differ")
        if self.data_check.memory is not None:
            self.data_check.memory.flush()

        def write() -> None:
            save_config(config, f"{config.run}/config.yaml")
            (merge_skipped if trainer.step else write_skipped)(skipped, str(self.skipped))

        on_main(write, trainer.is_main)  # the others wait, because they append to the skipped images later

    def loader(self, trainer: Trainer, seed: int) -> Iterator[Batch | CachedBatch]:
        """Yield the micro-batches of this process, from the current step of the trainer on.

        Too many images that can't be decoded, or a damaged latent cache, end the run in one line with exit code 2.
        """
        if isinstance(self.dataset, CachedLatents):
            collate_samples, buckets = cached_collate, self.dataset.buckets()
        else:
            collate_samples, buckets = collate, None if self.data_check.train is None else self.data_check.train.of
        order = trainer.order(len(self.dataset), seed, buckets)
        try:
            yield from make_loader(self.dataset, order, trainer.config.workers, collate_samples)
        except (TooManyBad, DamagedCache) as error:
            if trainer.is_main:
                print(file=sys.stderr)  # end the line of the progress bar
            with one_line_errors():  # an error of a worker starts with its traceback
                raise ValueError(str(error).rpartition(f"{type(error).__name__}: ")[2]) from None

    def weights(self, batch: Batch | CachedBatch) -> torch.Tensor:
        """The weights of the losses of a micro-batch: [B]."""
        return torch.tensor([self.records.train[index].weight for index in batch.indices.tolist()])

    def names(self, batch: Batch | CachedBatch) -> list[str]:
        """The names of the requested images of a micro-batch, even where an image was replaced, for messages."""
        return [self.records.train[index].name for index in batch.indices.tolist()]

    @contextmanager
    def reported(self, trainer: Trainer) -> Iterator[None]:
        """Print the total number of skipped images when the block ends, also by an exception."""
        try:
            yield
        finally:
            skips = read_skipped(str(self.skipped)) if trainer.is_main and self.skipped.exists() else []
            if skips:
                trainer.print(f"{len(skips)} skipped in total ({totals(skips)}); reasons in {self.skipped}")


def without_unusable(records: Records, cache: CachedLatents) -> Records:
    """The records that have latents in the cache, in its order; the others count as skipped."""
    usable, path = set(cache.usable.tolist()), Path(cache.folder) / "skipped.jsonl"
    reasons = {skip.path: skip.reason for skip in read_skipped(str(path))} if path.exists() else {}
    missing = (record.name for i, record in enumerate(records.train) if i not in usable)
    skipped = [*records.skipped, *(Skip(name, reasons.get(name, "not in the latent cache")) for name in missing)]
    kept = RecordList(record for i, record in enumerate(records.train) if i in usable)
    return Records(kept, records.validation, skipped)
