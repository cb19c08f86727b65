"""From rows to records, whatever the source: templates, `where`, the share held out, and what is too bad to go on."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.captions import columns_of, expand, fields_of
from storage.data_config import DataConfig
from storage.images import UnusableImage, read_size
from storage.records import Record, RecordList, Records, Skip, Source


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that a source holds, before captions are made of its row."""

    path: str  # as in Record
    name: str
    row: Mapping[str, Any]  # columns
    bytes: int
    source: Source | None = None
    place: int = 0


def gather(found: Iterable[Picture | Skip], config: DataConfig) -> Records:
    """The records of pictures that come in their order, split into training and validation.

    Raises ValueError if nothing is usable, if more than `max_bad_fraction` is not, or if a template or `where` names
    a column that no row has.
    """
    train, validation, skipped, columns = RecordList(), RecordList(), [], set()
    for each in found:
        if isinstance(each, Picture):
            row = flat(each.row)
            columns.update(row)
            if not wanted(row, config.where):
                continue
            each = make_record(each, row, config)
        if isinstance(each, Skip):
            skipped.append(each)
        else:
            (train if position(each.name) >= config.validation else validation).append(each)
    _check_columns(config, columns)
    check_enough(config, len(train), len(validation), skipped)
    return Records(train, validation, skipped)


def flat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose nested mappings have become columns of their own: {"a": {"b": 1}} has the column "a.b", too."""
    if not any(isinstance(value, Mapping) for value in row.values()):
        return row
    columns = dict(row)
    for name, value in row.items():
        if isinstance(value, Mapping):
            columns |= {f"{name}.{inner}": item for inner, item in flat(value).items()}
    return columns


def wanted(row: Mapping[str, Any], where: Mapping[str, list[Any]]) -> bool:
    """Whether each column of `where` has one of its values."""
    return all(_matches(row.get(column), values) for column, values in where.items())


def _matches(value: Any, wanted: list[Any]) -> bool:
    if value is None or value == "" or value == []:
        return None in wanted
    if isinstance(value, list):
        return any(_matches(item, wanted) for item in value)
    # .csv knows only text, so the YAML `true` has to match "True"; by type else, as Python holds 1 == True
    texts = {str(want).lower() for want in wanted if want is not None}
    return str(value).lower() in texts


def make_record(picture: Picture, row: Mapping[str, Any], config: DataConfig) -> Record | Skip:
    """A picture with the captions that the templates make of its row, or why it can't be used."""
    name = picture.name
    if picture.bytes < 0:
        return Skip(name, "a directory, not a file")
    if picture.bytes == 0:
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
        return Skip(name, "no caption: every template has a column that is missing or empty here")
    if config.maps is not None and not os.path.isfile(map_path(config.maps, name)):
        return Skip(name, f"no map: {map_path(config.maps, name)} is not there")
    record = Record(picture.path, name, captions, picture.bytes, picture.source, picture.place)
    try:
        if config.min_size > 1 or config.max_aspect is not None:
            with record.named():
                _check_size(read_size(record.open()), config)
    except UnusableImage as error:
        return Skip(name, str(error))
    return record


def without_held_out(row: Mapping[str, Any], shares: Mapping[str, float]) -> Mapping[str, Any]:
    """A row without the values of some columns that captions are not to show, see `is_held_out`."""
    kept = dict(row)
    for column, share in shares.items():
        values = row.get(column)
        several = values if isinstance(values, list) else [values]
        left = [value for value in several if not is_held_out(value, share)]
        kept[column] = left if isinstance(values, list) else next(iter(left), None)
    return kept


def is_held_out(value: Any, share: float) -> bool:
    """Whether a column's value is among the share that captions never show; by its text alone, in any case."""
    return position(str(value).casefold()) < share


def map_path(folder: str, name: str) -> str:
    """Where the map of the picture of this name lies, in the folder that `data.maps` names."""
    return os.path.join(folder, f"{os.path.splitext(name)[0]}.png")


def maps_fingerprint(folder: str, records: Iterable[Record]) -> str:
    """A sha256 of the maps' file sizes; one that is gone has none, which `ImageDataset` will say."""
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


def _check_columns(config: DataConfig, known: set[str]) -> None:
    """ValueError for a column that no row has: a spelling mistake, not a property of the data."""
    asked = [(f"caption template {t!r}", column) for t in config.captions for column in columns_of(t)]
    asked += [(f"data.{name}", column) for name in ("where", "hold_out") for column in getattr(config, name)]
    for who, column in asked:
        if known and column not in known:
            close = difflib.get_close_matches(column, known, n=1)
            mend = f"did you mean {close[0]}?" if close else f"the columns are {', '.join(sorted(known)[:20])}"
            raise ValueError(f"{who} names the column {column!r}, which no row of {config.origin} has; {mend}")


def check_enough(config: DataConfig, train: int, validation: int, skipped: list[Skip]) -> None:
    """ValueError unless so many usable pictures, and so much that had to be skipped, are enough to go on."""
    good = train + validation
    reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in skipped[:3])
    if good == 0:
        told = reasons or ("nothing passes data.where" if config.where else "there is no picture in it")
        raise ValueError(f"no usable captioned image in {config.origin}: {told}")
    fraction = len(skipped) / (len(skipped) + good)
    if fraction > config.max_bad_fraction:
        raise ValueError(
            f"{len(skipped)} of {len(skipped) + good} entries of {config.origin} can't be used, more than "
            f"data.max_bad_fraction {config.max_bad_fraction}: {reasons}"
        )
    if not train:
        raise ValueError(f"all {validation} images are held out by data.validation {config.validation}; use less")


def position(name: str) -> float:
    """A number in [0, 1) that depends on the name only: a picture stays in its split when others come or go."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
