"""Captioned images for training: a sample is a function of (seed, epoch, index), whoever asks for it, and wherever."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torch.utils.data import Dataset

from stipple_core.data.records.buckets import Buckets
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, Skip, SkipLog
from stipple_core.data.records.rows import map_path
from stipple_core.images.crop import Crop
from stipple_core.images.images import UnusableImage, load_image, load_map
from stipple_core.randomness import generator


@dataclass(frozen=True, slots=True)
class ImageSample:
    """One captioned image."""

    image: torch.Tensor  # [3, H, W] in [-1, 1]
    caption: str
    index: int  # of the record that was asked for
    hint: torch.Tensor | None = None  # [k, H, W], what a denoiser is shown of it; None: nothing
    frame: torch.Tensor | None = None  # [6] pixels, see `Crop.frame`
    name: str = ""  # of the record that is seen, which may stand in for the one that was asked for


@dataclass(frozen=True, slots=True)
class View:
    """A record's picture as it is trained on."""

    image: torch.Tensor  # [3, H, W] in [-1, 1]
    map: torch.Tensor | None  # [1, H, W], its own values; None: the data have no maps
    frame: tuple[float, ...]  # six numbers, see `Crop.frame`
    name: str  # of the record


@dataclass(frozen=True, slots=True)
class Batch:
    """Captioned images of one micro-batch."""

    images: torch.Tensor  # [B, 3, H, W] in [-1, 1]
    captions: list[str]
    indices: torch.Tensor  # [B] int64
    hints: torch.Tensor | None = None  # [B, k, H, W]
    frames: torch.Tensor | None = None  # [B, 6] pixels
    names: tuple[str, ...] = ()  # of the B records that are seen

    def pin_memory(self) -> Batch:
        """Called by the loader, so that the copy to a GPU does not wait."""
        hints = None if self.hints is None else self.hints.pin_memory()
        return dataclasses.replace(self, images=self.images.pin_memory(), hints=hints)


Hint = Callable[[torch.Tensor, torch.Tensor | None, torch.Generator], torch.Tensor]


def draw_from_nested(nested: Sequence[Sequence[Any]], generator: torch.Generator) -> Any:
    """First one of the inner sequences, then one of its elements, each uniformly."""
    inner = nested[torch.randint(len(nested), (), generator=generator).item()]
    return inner[torch.randint(len(inner), (), generator=generator).item()]


def draw_caption(record: Record, generator: torch.Generator) -> str:
    """A template first, then one of its expansions: a column with 20 keywords weighs no more than one with 2."""
    return draw_from_nested(record.captions, generator)


def draw_flip(seed: int, epoch: int, index: int) -> bool:
    """Whether this sample is mirrored in this epoch, where mirroring is on."""
    return torch.rand((), generator=generator(seed, "flip", epoch, index)).item() < 0.5


def replacements(seed: int, epoch: int, index: int, size: int) -> Iterator[int]:
    """The record itself, then 100 others that stand in for it, in turn, where it proves unusable."""
    yield index
    draws = generator(seed, "replacement", epoch, index)
    for _ in range(100):
        yield int(torch.randint(size, (), generator=draws))


class TooManyBad(ValueError):
    """More pictures can't be decoded than `data.max_bad_fraction` allows."""


class ImageDataset(Dataset):
    """Records decoded on demand: `dataset[epoch, index]` is a Sample, square or of the shape of its record's bucket.

    A file that can't be decoded is replaced by another record, drawn by the same address; it is kept in `.skipped`
    (once) and appended to the JSON-lines file `on_skip`, if that path is given. Raises TooManyBad when more than
    `max_bad_fraction` fail, OSError where the system does.

    Args:
        records: what there is to learn from.
        config: of the data.
        seed: the run's.
        on_skip: the file of skips that all processes and workers append to.
        buckets: of the records; None: all are square.
        hint: makes what a denoiser is shown of a picture, [k, H, W], of the image [3, H, W], its map [1, H, W] (None
            without maps) and a generator; picklable. None: nothing is shown.
        entries: of how many `max_bad_fraction` is the share that `on_skip` may name: records of both splits, and what
            was skipped before. None: the share of `records` that this object itself met.
    """

    def __init__(
        self,
        records: Sequence[Record],
        config: DataConfig,
        seed: int = 0,
        on_skip: str | None = None,
        buckets: Buckets | None = None,
        entries: int | None = None,
        hint: Hint | None = None,
    ):
        self.records, self.config, self.seed, self.buckets, self.hint = records, config, seed, buckets, hint
        self.log, self.entries = SkipLog(on_skip) if on_skip else None, entries
        self.background = ImageColor.getrgb(config.background)[:3]
        self.skipped: dict[int, Skip] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, address: tuple[int, int]) -> ImageSample:
        epoch, index = address
        flip = self.config.flip and draw_flip(self.seed, epoch, index)
        for candidate in replacements(self.seed, epoch, index, len(self.records)):
            crop = generator(self.seed, "crop", epoch, index) if self.config.crop == "random" else None
            view = self.view(candidate, flip, crop, self.shape(index))  # a batch is of one shape, whoever stands in
            if view is not None:
                caption = draw_caption(self.records[candidate], generator(self.seed, "caption", epoch, index))
                return self.sample(view, caption, index, generator(self.seed, "hint", epoch, index))
        raise TooManyBad(f"101 records in turn can't be decoded; the last is {self.records[candidate].path}")

    def held_out(self, index: int) -> ImageSample | None:
        """A record with its first caption, always the same; None if it can't be decoded."""
        view = self.view(index)
        caption = self.records[index].captions[0][0]
        return view and self.sample(view, caption, index, generator(self.seed, "held-out hint", index))

    def sample(self, view: View, caption: str, index: int, draws: torch.Generator) -> ImageSample:
        """What training needs of a view; `draws` is for what it shows of it."""
        hint = None if self.hint is None else self.hint(view.image, view.map, draws)
        return ImageSample(view.image, caption, index, hint, torch.tensor(view.frame, dtype=torch.float32), view.name)

    def shape(self, index: int) -> tuple[int, int]:
        """Width and height of a record's image, in pixels."""
        square = (self.config.image_size, self.config.image_size)
        return square if self.buckets is None else self.buckets.shape(index)

    def picture(
        self,
        index: int,
        flip: bool = False,
        crop: torch.Generator | None = None,
        shape: tuple[int, int] | None = None,
    ) -> torch.Tensor | None:
        """A record's image [3, H, W], or None if it can't be decoded; the arguments are those of `view`."""
        view = self.view(index, flip, crop, shape)
        return view and view.image

    def view(
        self,
        index: int,
        flip: bool = False,
        crop: torch.Generator | None = None,
        shape: tuple[int, int] | None = None,
    ) -> View | None:
        """A record's picture, or None if it can't be decoded.

        Args:
            index: of the record.
            flip: mirror it.
            crop: draws the place of a random crop.
            shape: width and height, if not its own.
        """
        if index in self.skipped:
            return None
        record, maps = self.records[index], self.config.maps
        try:
            with record.named():
                image = load_image(record.open(), self.background)
                map_of_it = None if maps is None else load_map(map_path(maps, record.name))
        except UnusableImage as error:
            self._skip(index, str(error))
            return None
        place = "random" if crop is not None else "center"
        cutout = Crop.covering(image.size, shape or self.shape(index), place, flip, crop)
        seen_map = None if map_of_it is None else cutout.map(map_of_it)
        return View(cutout.image(image), seen_map, cutout.frame, record.name)

    def _skip(self, index: int, reason: str) -> None:
        self.skipped[index] = Skip(self.records[index].name, reason)
        bad, among = len(self.skipped), len(self.records)
        if self.log is not None:
            logged = self.log.append(self.skipped[index])  # by all processes
            bad, among = (logged, self.entries) if self.entries is not None else (bad, among)
        if bad > self.config.max_bad_fraction * among:
            raise TooManyBad(
                f"{bad} of {among} images can't be used, more than data.max_bad_fraction "
                f"{self.config.max_bad_fraction}; the last is {self.records[index].path}: {reason}"
            )


def collate(samples: Sequence[ImageSample]) -> Batch:
    """Samples as a Batch."""
    # numpy: torch would split the copy over threads, 60 ms where other processes keep the cores busy
    images = torch.from_numpy(np.stack([sample.image.numpy() for sample in samples]))  # [B, 3, H, W]
    hints = None if samples[0].hint is None else torch.stack([sample.hint for sample in samples])  # [B, k, H, W]
    frames = None if samples[0].frame is None else torch.stack([sample.frame for sample in samples])  # [B, 6]
    indices = torch.tensor([sample.index for sample in samples])
    names = tuple(sample.name for sample in samples)
    return Batch(images, [sample.caption for sample in samples], indices, hints, frames, names)
