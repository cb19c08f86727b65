"""A folder of captioned images as records: Hugging Face image folders, sidecar .txt captions, nested folders.

A caption comes from a row of a metadata.jsonl or metadata.csv at any level (its `file_name` is relative to the folder
that it lies in), or from NAME.txt beside NAME.png (column "text"; several lines are several captions). What can't be
used is skipped with a reason.

Scanning costs one `os.scandir` per folder and no look into any picture: that a picture is there and not empty comes
from the folder's listing. Damaged pictures are met when they are decoded, and replaced there (`storage.dataset`).
Only `min_size` above 1 reads headers.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.captions import columns_of, expand
from storage.images import CROPS, UnusableImage, read_size
from storage.metadata import METADATA, read_rows, read_sidecar

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, which captions, and how a picture becomes a square."""

    folder: str  # searched with all its subfolders
    image_size: int = 256  # pixels, both sides
    captions: list[str] = field(default_factory=lambda: ["{text}"])  # templates over columns; repeat one to weigh it
    where: dict[str, list[Any]] = field(default_factory=dict)  # keep rows whose column has one of these; null: missing
    crop: str = "center"  # or "random", along the long side
    flip: bool = False  # mirror half of the pictures; wrong where there is writing
    validation: float = 0.02  # share held out, drawn by a hash of the file name
    min_size: int = 1  # pixels; a shorter side is skipped. Above 1, scanning reads every header
    background: str = "white"  # shown through alpha: a color name, or "#rrggbb"
    max_bad_fraction: float = 0.5  # more skipped than this stops the run

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"data.crop is {self.crop!r}; it must be one of {', '.join(CROPS)}")
        if self.image_size < 1:
            raise ValueError(f"data.image_size is {self.image_size}; it must be at least 1 pixel")
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation is {self.validation}; it is a fraction, at least 0 and below 1")
        if not self.captions:
            raise ValueError('data.captions is empty; it needs at least one template, such as "{text}"')
        for template in self.captions:
            columns_of(template)


@dataclass(frozen=True, slots=True)
class Record:
    """A picture and its captions: one inner tuple for each template, holding that template's expansions."""

    path: str  # absolute
    name: str  # relative to the data folder, with "/"
    captions: tuple[tuple[str, ...], ...]
    bytes: int = 0  # file size, for the fingerprint


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that can't be used: its name in the data folder, or FILE:LINE of a metadata file, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Records:
    """What `scan` found, in order of names."""

    train: list[Record]
    validation: list[Record]
    skipped: list[Skip]


def scan(config: DataConfig, captioned: bool = True) -> Records:
    """The records of `config.folder`, read from metadata and listings only.

    With `captioned` false, as for an autoencoder, captions are not looked at and an image without one is used too.

    Raises FileNotFoundError if there is no such folder; ValueError if nothing is usable, if more than
    `max_bad_fraction` is not, or if a template or `where` names a column that no row has.
    """
    root = os.path.abspath(config.folder)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data folder {config.folder} does not exist; data.folder is the folder of your images")
    files = dict(_walk(root, ""))
    rows, skipped = _gather_rows(root, files)
    if not captioned:
        config = dataclasses.replace(config, captions=["image"])  # one that every image has
        rows |= {name: {} for name in files if _is_image(name) and name not in rows}
        skipped = [skip for skip in skipped if skip.path not in rows and not skip.path.endswith(".txt")]
    _check_columns(config, rows)
    kept = {name: row for name, row in rows.items() if _wanted(row, config.where)}
    records = []
    for name, row in sorted(kept.items()):
        made = _make_record(root, name, files[name], row, config)
        (records if isinstance(made, Record) else skipped).append(made)
    _check_enough(config, len(records), skipped)
    train = [record for record in records if _position(record.name) >= config.validation]
    validation = [record for record in records if _position(record.name) < config.validation]
    if not train:
        raise ValueError(f"all {len(validation)} images are held out by data.validation {config.validation}; use less")
    return Records(train, validation, skipped)


def write_skipped(skips: Iterable[Skip], path: str) -> None:
    """Write skips as JSON lines of path and reason."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in skips)


def fingerprint(records: Iterable[Record]) -> str:
    """A sha256 of names, file sizes and captions: for the key of what is made from the records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.name, record.bytes, record.captions]).encode())
    return digest.hexdigest()


def _walk(root: str, folder: str) -> Iterator[tuple[str, int]]:
    """Names relative to `root` and sizes of all files that are not hidden; -1 marks a directory named like an image."""
    with os.scandir(os.path.join(root, folder)) as entries:
        listing = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in listing:
        name = posixpath.join(folder, entry.name)
        try:
            if entry.is_dir():
                if _is_image(name):
                    yield name, -1
                elif not entry.is_symlink():  # a linked folder could hold its own parent
                    yield from _walk(root, name)
            else:
                yield name, entry.stat().st_size
        except OSError:
            yield name, 0  # a broken link, or no permission: as good as empty


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _gather_rows(root: str, files: Mapping[str, int]) -> tuple[dict[str, dict[str, Any]], list[Skip]]:
    """Rows by file name, from metadata files first, then sidecars; and what can't be used of them."""
    rows: dict[str, dict[str, Any]] = {}
    skipped: list[Skip] = []
    found = (name for name in files if posixpath.basename(name) in METADATA)
    for metadata in sorted(found, key=lambda name: -name.count("/")):  # the nearest to a picture describes it
        for line, row in read_rows(os.path.join(root, metadata)):
            place = f"{metadata}:{line}"
            name = _resolve(posixpath.dirname(metadata), row)
            reason = row if isinstance(row, str) else _refusal(name, files, rows)
            if reason:
                skipped.append(Skip(place, reason))
            else:
                rows[name] = row
    for name in filter(_is_image, files):
        sidecar = f"{posixpath.splitext(name)[0]}.txt"
        if sidecar in files and not rows.get(name, {}).get("text"):
            text = read_sidecar(os.path.join(root, sidecar))
            if isinstance(text, list):
                rows[name] = {**rows.get(name, {}), "text": text}
            elif name not in rows:
                skipped.append(Skip(sidecar, text))
        elif name not in rows:
            skipped.append(Skip(name, "no caption: neither a metadata row nor a .txt file beside it"))
    return rows, skipped


def _resolve(folder: str, row: Any) -> str | None:
    """The row's file relative to the data folder; None if it names none, or one outside."""
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name or name.startswith("/"):
        return None
    name = posixpath.normpath(posixpath.join(folder, name))
    return None if name.startswith("../") or name == ".." else name


def _refusal(name: str | None, files: Mapping[str, int], rows: Mapping[str, Any]) -> str | None:
    if name is None:
        return "file_name is missing, or leads out of the data folder"
    if name not in files:
        return f"no such file: {name[:200]}"
    if name in rows:
        return f"duplicate file_name {name}; its first row is used"
    return None


def _check_columns(config: DataConfig, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError for a column that no row has: a spelling mistake, not a property of the data."""
    known = {column for row in rows.values() for column in row}
    asked = [(f"caption template {t!r}", column) for t in config.captions for column in columns_of(t)]
    asked += [("data.where", column) for column in config.where]
    for who, column in asked:
        if rows and column not in known:
            close = difflib.get_close_matches(column, known, n=1)
            mend = f"did you mean {close[0]}?" if close else f"the columns are {', '.join(sorted(known)[:20])}"
            raise ValueError(f"{who} names the column {column!r}, which no row of {config.folder} has; {mend}")


def _wanted(row: Mapping[str, Any], where: Mapping[str, list[Any]]) -> bool:
    return all(_matches(row.get(column), values) for column, values in where.items())


def _matches(value: Any, wanted: list[Any]) -> bool:
    if value is None or value == "" or value == []:
        return None in wanted
    if isinstance(value, list):
        return any(_matches(item, wanted) for item in value)
    # .csv knows only text, so the YAML `true` has to match "True"; by type else, as Python holds 1 == True
    texts = {str(want).lower() for want in wanted if want is not None}
    return str(value).lower() in texts


def _make_record(root: str, name: str, size: int, row: Mapping[str, Any], config: DataConfig) -> Record | Skip:
    path = os.path.join(root, name)
    if size < 0:
        return Skip(name, "a directory, not a file")
    if size == 0:
        return Skip(name, "empty file")
    try:
        captions = [expand(template, columns_of(template), row) for template in config.captions]
        if config.min_size > 1 and min(read_size(path)) < config.min_size:
            return Skip(name, f"shorter side below min_size {config.min_size}")
    except (UnusableImage, ValueError) as error:
        return Skip(name, str(error))
    captions = tuple(filter(None, captions))
    if not captions:
        return Skip(name, "no caption: every template has a column that is missing or empty here")
    return Record(path, name, captions, size)


def _check_enough(config: DataConfig, good: int, skipped: list[Skip]) -> None:
    reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in skipped[:3])
    if good == 0:
        raise ValueError(f"no usable captioned image in {config.folder}: {reasons or 'nothing passes data.where'}")
    fraction = len(skipped) / (len(skipped) + good)
    if fraction > config.max_bad_fraction:
        raise ValueError(
            f"{len(skipped)} of {len(skipped) + good} entries of {config.folder} can't be used, more than "
            f"data.max_bad_fraction {config.max_bad_fraction}: {reasons}"
        )


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the name only: a picture stays in its split when others come or go."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
