"""The dataset of captioned images: a sample depends only on (seed, epoch, index), in any process and any worker."""

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
    index: int  # of the requested record
    hint: torch.Tensor | None = None  # [k, H, W], input of a spatially conditioned denoiser; None: there is none
    frame: torch.Tensor | None = None  # [6] in pixels, see `Crop.frame`
    name: str = ""  # of the record that is used, which may replace the requested one


@dataclass(frozen=True, slots=True)
class View:
    """The image of a record, cropped for training."""

    image: torch.Tensor  # [3, H, W] in [-1, 1]
    map: torch.Tensor | None  # [1, H, W], with values not interpolated; None: the data have no maps
    frame: tuple[float, ...]  # 6 numbers in pixels, see `Crop.frame`
    name: str  # of the record


@dataclass(frozen=True, slots=True)
class Batch:
    """The captioned images of one micro-batch."""

    images: torch.Tensor  # [B, 3, H, W] in [-1, 1]
    captions: list[str]
    indices: torch.Tensor  # [B] int64
    hints: torch.Tensor | None = None  # [B, k, H, W]
    frames: torch.Tensor | None = None  # [B, 6] in pixels
    names: tuple[str, ...] = ()  # of the B records that are used

    def pin_memory(self) -> Batch:
        """Move the tensors to pinned memory; called by the loader for asynchronous copies to a GPU."""
        hints = None if self.hints is None else self.hints.pin_memory()
        return dataclasses.replace(self, images=self.images.pin_memory(), hints=hints)


Hint = Callable[[torch.Tensor, torch.Tensor | None, torch.Generator], torch.Tensor]


def draw_from_nested(nested: Sequence[Sequence[Any]], generator: torch.Generator) -> Any:
    """Draw one of the inner sequences, then one of its elements, each uniformly."""
    inner = nested[torch.randint(len(nested), (), generator=generator).item()]
    return inner[torch.randint(len(inner), (), generator=generator).item()]


def draw_caption(record: Record, generator: torch.Generator) -> str:
    """Draw a template, then one of its captions: a column with 20 keywords has the same weight as one with 2."""
    return draw_from_nested(record.captions, generator)


def draw_flip(seed: int, epoch: int, index: int) -> bool:
    """Draw whether a sample is mirrored in an epoch, if mirroring is enabled."""
    return torch.rand((), generator=generator(seed, "flip", epoch, index)).item() < 0.5


def replacements(seed: int, epoch: int, index: int, size: int) -> Iterator[int]:
    """Yield the record's index, then those of 100 randomly drawn replacements, in case records are unusable."""
    yield index
    draws = generator(seed, "replacement", epoch, index)
    for _ in range(100):
        yield int(torch.randint(size, (), generator=draws))


class TooManyBad(ValueError):
    """More images can't be decoded than `data.max_bad_fraction` allows."""


class ImageDataset(Dataset):
    """Captioned images, decoded on demand: `dataset[epoch, index]` is an ImageSample.

    Images are square, or have the shape of their record's bucket. A record that can't be decoded is replaced by another
    one, drawn from the same address. It is added to `.skipped` and to the file `on_skip`.

    Args:
        records: the records.
        config: the data section of the config.
        seed: the run's seed.
        on_skip: a JSON-lines file to which all processes and workers append skipped entries. None: no file.
        buckets: the buckets of the records. None: all images are square.
        entries: the total number of entries of which `max_bad_fraction` may be in `on_skip`: the records of both
            splits, and what was skipped before. None: only skipped records of this object count, relative to `records`.
        hint: computes `ImageSample.hint` from the image [3, H, W], its map [1, H, W] (None without maps) and a
            generator; it must be picklable. None: no hint.

    Raises:
        TooManyBad: on indexing, if more than `max_bad_fraction` can't be decoded.
        OSError: on indexing, if the system fails.
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
            view = self.view(candidate, flip, crop, self.shape(index))  # a replacement has the shape of its batch
            if view is not None:
                caption = draw_caption(self.records[candidate], generator(self.seed, "caption", epoch, index))
                return self.sample(view, caption, index, generator(self.seed, "hint", epoch, index))
        raise TooManyBad(f"101 records in a row can't be decoded; the last is {self.records[candidate].path}")

    def held_out(self, index: int) -> ImageSample | None:
        """Return a record with its first caption and no random crop or flip; None if it can't be decoded."""
        view = self.view(index)
        caption = self.records[index].captions[0][0]
        return view and self.sample(view, caption, index, generator(self.seed, "held-out hint", index))

    def sample(self, view: View, caption: str, index: int, draws: torch.Generator) -> ImageSample:
        """Combine a view and a caption to a sample; `draws` is the generator for its hint."""
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
        """Return a record's image [3, H, W], or None if it can't be decoded. Arguments as in `view`."""
        view = self.view(index, flip, crop, shape)
        return view and view.image

    def view(
        self,
        index: int,
        flip: bool = False,
        crop: torch.Generator | None = None,
        shape: tuple[int, int] | None = None,
    ) -> View | None:
        """Return the cropped image of a record, or None if it can't be decoded.

        Args:
            index: of the record.
            flip: whether to mirror the image.
            crop: the generator of a random crop. None: center crop.
            shape: width and height. None: the shape of the record's bucket.
        """
        if index in self.skipped:
            return None
        record, maps = self.records[index], self.config.maps
        try:
            with record.named():
                image = load_image(record.open(), self.background)
                map_image = None if maps is None else load_map(map_path(maps, record.name))
        except UnusableImage as error:
            self._skip(index, str(error))
            return None
        place = "random" if crop is not None else "center"
        cropping = Crop.covering(image.size, shape or self.shape(index), place, flip, crop)
        cropped_map = None if map_image is None else cropping.map(map_image)
        return View(cropping.image(image), cropped_map, cropping.frame, record.name)

    def _skip(self, index: int, reason: str) -> None:
        self.skipped[index] = Skip(self.records[index].name, reason)
        bad, among = len(self.skipped), len(self.records)
        if self.log is not None:
            logged = self.log.append(self.skipped[index])  # entries of all processes
            bad, among = (logged, self.entries) if self.entries is not None else (bad, among)
        if bad > self.config.max_bad_fraction * among:
            raise TooManyBad(
                f"{bad} of {among} images can't be used, more than data.max_bad_fraction "
                f"{self.config.max_bad_fraction}; the last is {self.records[index].path}: {reason}"
            )


def collate(samples: Sequence[ImageSample]) -> Batch:
    """Combine samples to a batch."""
    # numpy: torch copies with several threads, which took 60 ms on a machine with busy cores
    images = torch.from_numpy(np.stack([sample.image.numpy() for sample in samples]))  # [B, 3, H, W]
    hints = None if samples[0].hint is None else torch.stack([sample.hint for sample in samples])  # [B, k, H, W]
    frames = None if samples[0].frame is None else torch.stack([sample.frame for sample in samples])  # [B, 6]
    indices = torch.tensor([sample.index for sample in samples])
    names = tuple(sample.name for sample in samples)
    return Batch(images, [sample.caption for sample in samples], indices, hints, frames, names)
