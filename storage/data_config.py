"""What a run says about its data: which pictures, which captions, and how a picture becomes a square."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from PIL import ImageColor

from storage.buckets import BucketConfig, bucket_shapes
from storage.captions import columns_of
from storage.images import CROPS

MISSING_CAPTIONS = ("skip", "empty")
SOURCES = ("folder", "shards", "dataset")  # exactly one of these is given


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, which captions, and how a picture becomes a square."""

    folder: str | None = None  # of pictures, or of .tar or .parquet files; searched with all its subfolders
    shards: str | list[str] = field(default_factory=list)  # or .tar and .parquet files: paths, URLs, pipe:COMMAND
    dataset: str | None = None  # or a Hugging Face dataset: a folder written by save_to_disk, or NAME or NAME:CONFIG
    split: str = "train"  # of the dataset
    image_column: str | None = None  # of parquet files and datasets; null: the only one that holds pictures
    index: str = "cache/index"  # folder that remembers what shards hold, and keeps what pipe: and parquet files give
    image_size: int = 256  # pixels, both sides
    captions: list[str] = field(default_factory=lambda: ["{text}"])  # templates; repeat one to weigh it; []: none
    where: dict[str, list[Any]] = field(default_factory=dict)  # keep rows whose column has one of these; null: missing
    # of a column's values, the share that captions never show, such as {keywords: 0.25}: to measure with them later
    hold_out: dict[str, float] = field(default_factory=dict)
    crop: str = "center"  # or "random", along the long side
    flip: bool = False  # mirror half of the pictures; wrong where there is writing
    validation: float = 0.02  # share held out, drawn by a hash of the picture's name
    min_size: int = 1  # pixels; a shorter side is skipped. Above 1, scanning reads every header
    max_aspect: float | None = None  # of long to short side; a narrower one is skipped. Reads headers, too
    buckets: BucketConfig | None = None  # shapes besides the square, such as {step: 64}; null: all are cut square
    missing_caption: str = "skip"  # or "empty": a picture without a caption is trained on as if its caption was dropped
    verify: bool = True  # decode all once before the first step; false: bad ones are replaced when they are met
    maps: str | None = None  # folder of what lies where: the map of picture a/b.webp is a/b.png in it, of one channel
    background: str = "white"  # shown through alpha: a color name, or "#rrggbb"
    max_bad_fraction: float = 0.5  # more skipped than this stops the run

    def __post_init__(self) -> None:
        given = [name for name in SOURCES if getattr(self, name)]
        if not given and self.folder is None:
            raise ValueError(
                "data.folder has no value; set it in the YAML file or by data.folder=FOLDER, or give data.shards or "
                "data.dataset"
            )
        if len(given) > 1:
            raise ValueError(
                f"data.{given[0]} and data.{given[1]} are both given; leave one out (data.folder=null data.shards=[])"
            )
        if self.crop not in CROPS:
            raise ValueError(f"data.crop is {self.crop!r}; it must be one of {', '.join(CROPS)}")
        if self.missing_caption not in MISSING_CAPTIONS:
            choices = ", ".join(MISSING_CAPTIONS)
            raise ValueError(f"data.missing_caption is {self.missing_caption!r}; it must be one of {choices}")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise ValueError(f"data.max_aspect is {self.max_aspect}; it is long over short side, at least 1")
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
        """Where the data come from, as the user put it, for messages."""
        shards = [self.shards] if isinstance(self.shards, str) else self.shards
        return self.folder or self.dataset or f"{', '.join(shards[:3])}{', ...' * (len(shards) > 3)}"

    @property
    def overrides(self) -> list[str]:
        """What to say on a command line for another script to find the same pictures, as key=value."""
        values = {name: getattr(self, name) for name in (*SOURCES, "split", "image_column", "index")}
        defaults = {field.name: field.default for field in fields(self)} | {"shards": []}
        given = {name: value for name, value in values.items() if value != defaults[name]}
        said = [f"data.{k}={json.dumps(v) if isinstance(v, list) else v}" for k, v in given.items()]
        return said if self.folder else ["data.folder=null", *said]  # the other script's config may have a folder
