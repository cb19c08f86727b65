"""From rows of any source to records: caption templates, `where`, the validation split, and limits of bad entries."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stipple_core.data.records.captions import columns_of, expand, fields_of
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, RecordList, Records, Skip, Source
from stipple_core.images.images import UnusableImage, read_size
from stipple_core.nearest import did_you_mean


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image in a source, with its row, before captions are made."""

    path: str  # this and all other fields but `row` as in Record
    name: str
    row: Mapping[str, Any]  # values by column
    bytes: int
    source: Source | None = None
    place: int = 0


def gather(images: Iterable[SourceImage | Skip], config: DataConfig) -> Records:
    """Make records of images in order, and split them into training and validation.

    Raises:
        ValueError: no image is usable, more than `max_bad_fraction` are unusable, or a template, `where` or
            `hold_out` names a column that no row has.
    """
    train, validation, skipped, columns = RecordList(), RecordList(), [], set()
    for each in images:
        if isinstance(each, SourceImage):
            row = flatten(each.row)
            columns.update(row)
            if not matches_where(row, config.where):
                continue
            each = make_record(each, row, config)
        if isinstance(each, Skip):
            skipped.append(each)
        else:
            (train if split_position(each.name) >= config.validation else validation).append(each)
    _check_columns(config, columns)
    require_enough(config, len(train), len(validation), skipped)
    return Records(train, validation, skipped)


def flatten(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the values of nested mappings as columns: {"a": {"b": 1}} also gets the column "a.b"."""
    if not any(isinstance(value, Mapping) for value in row.values()):
        return row
    columns = dict(row)
    for name, value in row.items():
        if isinstance(value, Mapping):
            columns |= {f"{name}.{inner}": item for inner, item in flatten(value).items()}
    return columns


def matches_where(row: Mapping[str, Any], where: Mapping[str, list[Any]]) -> bool:
    """Whether the row has one of the values of `where` in each of its columns."""
    return all(_matches(row.get(column), values) for column, values in where.items())


def _matches(value: Any, accepted: list[Any]) -> bool:
    if value is None or value == "" or value == []:
        return None in accepted
    if isinstance(value, list):
        return any(_matches(item, accepted) for item in value)
    # compared as text: CSV files contain only text, so YAML's `true` must match "True"; and 1 must not equal True
    texts = {str(each).lower() for each in accepted if each is not None}
    return str(value).lower() in texts


def make_record(image: SourceImage, row: Mapping[str, Any], config: DataConfig) -> Record | Skip:
    """Make the record of an image with captions from its row, or return a Skip if it can't be used."""
    name = image.name
    if image.bytes < 0:
        return Skip(name, "a directory, not a file")
    if image.bytes == 0:
        return Skip(name, "empty file")
    try:
        shown = without_held_out(row, config.hold_out)
        captions = [expand(template, fields_of(template), shown) for template in config.captions]
    except ValueError as error:
        return Skip(name, str(error))
    captions = tuple(filter(None, captions))
    if not captions and (config.missing_caption == "empty" or not config.captions):
        captions = (("",),)
    if not captions:
        return Skip(name, "no caption: each template has a column that is missing or empty")
    if config.maps is not None and not os.path.isfile(map_path(config.maps, name)):
        return Skip(name, f"no map: {map_path(config.maps, name)} does not exist")
    record = Record(image.path, name, captions, image.bytes, image.source, image.place)
    try:
        if config.min_size > 1 or config.max_aspect is not None:
            with record.named():
                _check_size(read_size(record.open()), config)
    except UnusableImage as error:
        return Skip(name, str(error))
    return record


def without_held_out(row: Mapping[str, Any], fractions: Mapping[str, float]) -> Mapping[str, Any]:
    """Return a copy of a row without its held-out values (`is_held_out`); `fractions` is `data.hold_out`."""
    copied = dict(row)
    for column, fraction in fractions.items():
        value = row.get(column)
        values = value if isinstance(value, list) else [value]
        shown = [each for each in values if not is_held_out(each, fraction)]
        copied[column] = shown if isinstance(value, list) else next(iter(shown), None)
    return copied


def is_held_out(value: Any, fraction: float) -> bool:
    """Whether a column's value is in the fraction that no caption contains; depends only on its text, ignoring case."""
    return split_position(str(value).casefold()) < fraction


def map_path(folder: str, name: str) -> str:
    """The path of an image's map in `folder`, which is `data.maps`."""
    return os.path.join(folder, f"{os.path.splitext(name)[0]}.png")


def maps_fingerprint(folder: str, records: Iterable[Record]) -> str:
    """SHA-256 of the file sizes of maps. `ImageDataset` reports missing ones."""
    digest = hashlib.sha256()
    for record in records:
        path = map_path(folder, record.name)
        digest.update(f"{os.path.getsize(path) if os.path.isfile(path) else None} ".encode())
    return digest.hexdigest()


def _check_size(size: tuple[int, int], config: DataConfig) -> None:
    short, long = sorted(size)
    if short < config.min_size:
        raise UnusableImage(f"too small: {size[0]} x {size[1]}, a side below data.min_size {config.min_size}")
    if config.max_aspect is not None and long > short * config.max_aspect:
        raise UnusableImage(f"too narrow: {size[0]} x {size[1]}, beyond data.max_aspect {config.max_aspect:g}")


def _check_columns(config: DataConfig, columns: set[str]) -> None:
    """Raise a ValueError if a template, `where` or `hold_out` names a column that no row has: a spelling error."""
    named = [(f"caption template {t!r}", column) for t in config.captions for column in columns_of(t)]
    named += [(f"data.{name}", column) for name in ("where", "hold_out") for column in getattr(config, name)]
    for where, column in named:
        if columns and column not in columns:
            nearest = did_you_mean(column, columns, cutoff=0.6)
            fix = f"did you mean {nearest}?" if nearest else f"the columns are {', '.join(sorted(columns)[:20])}"
            raise ValueError(f"{where} names the column {column!r}, which no row of {config.origin} has; {fix}")


def require_enough(config: DataConfig, train: int, validation: int, skipped: list[Skip]) -> None:
    """Raise a ValueError if no image is usable, or too many entries were skipped, or none is left for training."""
    good = train + validation
    reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in skipped[:3])
    if good == 0:
        cause = reasons or ("no row matches data.where" if config.where else "it contains no image")
        raise ValueError(f"no usable captioned image in {config.origin}: {cause}")
    fraction = len(skipped) / (len(skipped) + good)
    if fraction > config.max_bad_fraction:
        raise ValueError(
            f"{len(skipped)} of {len(skipped) + good} entries of {config.origin} can't be used, more than "
            f"data.max_bad_fraction {config.max_bad_fraction}: {reasons}"
        )
    if not train:
        raise ValueError(
            f"all {validation} images are held out by data.validation {config.validation}; use a smaller fraction"
        )


def split_position(name: str) -> float:
    """A number in [0, 1) that depends only on the name: an image keeps its split when others are added or removed."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
