"""The data section of a config: where images and captions come from, and how images are cropped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from PIL import ImageColor

from stipple_core.data.records.buckets import BucketConfig, bucket_shapes
from stipple_core.data.records.captions import columns_of
from stipple_core.images.images import CROPS

MISSING_CAPTIONS = ("skip", "empty")
SOURCES = ("folder", "shards", "dataset")  # exactly one of these must be set


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and captions come from, and how images are cropped."""

    folder: str | None = None  # with images, or .tar or .parquet files; subfolders are included
    shards: str | list[str] = field(default_factory=list)  # or .tar and .parquet files: paths, URLs, pipe:COMMAND
    dataset: str | None = None  # or a Hugging Face dataset: NAME, NAME:CONFIG, or a folder written by save_to_disk
    split: str = "train"  # of the dataset
    image_column: str | None = None  # of parquet files and datasets; null: the only one with images
    index: str = "cache/index"  # folder for indices of shards, outputs of pipe:, and unpacked parquet files
    image_size: int = 256  # pixels, both sides
    captions: list[str] = field(default_factory=lambda: ["{text}"])  # templates; repeat one to weight it; []: none
    where: dict[str, list[Any]] = field(default_factory=dict)  # use rows with one of these values; null: missing
    # fraction of a column's values that no caption contains, for evaluation, such as {keywords: 0.25}
    hold_out: dict[str, float] = field(default_factory=dict)
    crop: str = "center"  # or "random": where the longer side is cropped
    flip: bool = False  # mirror half of the images; do not use it with images of text
    validation: float = 0.02  # fraction held out, selected by a hash of the image's name
    min_size: int = 1  # pixels; images with a shorter side are skipped. Above 1, scanning reads every header
    max_aspect: float | None = None  # of long to short side; narrower images are skipped. Scanning reads every header
    buckets: BucketConfig | None = None  # shapes besides the square, such as {step: 64}; null: only the square
    missing_caption: str = "skip"  # or "empty": train on images without a caption as if it was dropped
    verify: bool = True  # decode all images before the first step; false: replace bad ones during training
    maps: str | None = None  # folder of one-channel maps: the map of image a/b.webp is a/b.png
    background: str = "white"  # color behind transparent pixels: a name, or "#rrggbb"
    max_bad_fraction: float = 0.5  # a higher fraction of skipped entries is an error

    def __post_init__(self) -> None:
        sources = [name for name in SOURCES if getattr(self, name)]
        if not sources and self.folder is None:
            raise ValueError(
                "data.folder has no value; set it in the YAML file or by data.folder=FOLDER, or use data.shards or "
                "data.dataset"
            )
        if len(sources) > 1:
            raise ValueError(
                f"data.{sources[0]} and data.{sources[1]} are both set; use only one (data.folder=null data.shards=[])"
            )
        if self.crop not in CROPS:
            raise ValueError(f"data.crop is {self.crop!r}; it must be one of {', '.join(CROPS)}")
        if self.missing_caption not in MISSING_CAPTIONS:
            choices = ", ".join(MISSING_CAPTIONS)
            raise ValueError(f"data.missing_caption is {self.missing_caption!r}; it must be one of {choices}")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise ValueError(f"data.max_aspect is {self.max_aspect}; it is the ratio of long to short side, at least 1")
        if self.buckets is not None:
            bucket_shapes(self.image_size, self.buckets)
        if self.min_size < 0:
            raise ValueError(f"data.min_size is {self.min_size}; it must be at least 0 pixels")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}; it is a fraction, from 0 to 1")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"data.background is {self.background!r}; it must be a color's name, such as white, or '#rrggbb'"
            ) from None
        if self.image_size < 1:
            raise ValueError(f"data.image_size is {self.image_size}; it must be at least 1 pixel")
        for column, share in self.hold_out.items():
            if not 0 <= share < 1:
                raise ValueError(f"data.hold_out.{column} is {share}; it is a fraction, at least 0 and below 1")
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation is {self.validation}; it is a fraction, at least 0 and below 1")
        for template in self.captions:
            columns_of(template)

    @property
    def origin(self) -> str:
        """The data source as the user specified it, for messages."""
        shards = [self.shards] if isinstance(self.shards, str) else self.shards
        return self.folder or self.dataset or f"{', '.join(shards[:3])}{', ...' * (len(shards) > 3)}"

    @property
    def overrides(self) -> list[str]:
        """The key=value overrides with which another command uses the same data source."""
        values = {name: getattr(self, name) for name in (*SOURCES, "split", "image_column", "index")}
        defaults = {field.name: field.default for field in fields(self)} | {"shards": []}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        overrides = [f"data.{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in changed.items()]
        return overrides if self.folder else ["data.folder=null", *overrides]  # the other config may set a folder
