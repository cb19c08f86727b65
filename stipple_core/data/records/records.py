"""Records of images and captions, a compact list of millions of them, and lists of skipped entries."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

from stipple_core.files.atomic import lock_file, writing


class Source(Protocol):
    """A file that contains many images. It is small, picklable and hashable, and each process opens it itself."""

    path: str

    def open(self, place: int, size: int) -> str | IO[bytes]:
        """Return the image of `size` bytes at a place: the offset in a tar, or the row in a table."""

    def state(self) -> dict[str, Any]:
        """Plain values that change with the contents. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Record:
    """An image and its captions: one inner tuple for each template, with all expansions of the template."""

    path: str  # absolute path of the file, or of the shard or table that contains it
    name: str  # within the data: relative to the data folder, with "/"; SHARD/KEY.EXT in a tar; TABLE:ROW in a table
    captions: tuple[tuple[str, ...], ...]
    bytes: int = 0  # size of the image file, for the fingerprint
    source: Source | None = None  # None: the image is a separate file
    place: int = 0  # offset or row in the source
    weight: float = 1.0  # of the image in the loss

    def open(self) -> str | IO[bytes]:
        """Return the argument of `load_image` and `read_size`: the path of the file, or its bytes from a larger file.

        Raises:
            UnusableImage: the source has no image there.
            OSError: the source can't be read.
        """
        return self.path if self.source is None else self.source.open(self.place, self.bytes)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Add this image's name to an OSError without a file name."""
        try:
            yield
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = self.path if self.source is None else f"{self.name} in {self.source.path}"
            raise


@dataclass(frozen=True, slots=True)
class Skip:
    """An entry that can't be used, and why."""

    path: str  # the name in the data, or FILE:LINE of a metadata file
    reason: str


@dataclass(frozen=True, slots=True)
class Records:
    """The result of `scan`, in an order that depends only on the data."""

    train: Sequence[Record]
    validation: Sequence[Record]
    skipped: list[Skip]


class RecordList(Sequence[Record]):
    """Records stored in a few arrays: 100 bytes and the text for each, where a list of objects needs 600 bytes.

    Indexing creates the objects. Forked workers share the arrays, because these have no reference counts that change.
    """

    def __init__(self, records: Iterable[Record] = ()):
        self._texts = bytearray()  # concatenated JSON of name and captions
        self._ends, self._bytes, self._places = array("q", [0]), array("q"), array("q")
        self._weights = array("d")
        # holders: source; path, or folder of the path; whether the name must be appended
        self._holders, self._numbers = [], array("i")
        self._known: dict[tuple[Source | None, str, bool], int] = {}
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Append a record."""
        joined = record.source is None and record.path.endswith(record.name)
        holder = (record.source, record.path.removesuffix(record.name) if joined else record.path, joined)
        number = self._known.setdefault(holder, len(self._holders))
        if number == len(self._holders):
            self._holders.append(holder)
        self._numbers.append(number)
        self._texts += json.dumps([record.name, record.captions]).encode()
        self._ends.append(len(self._texts))
        self._bytes.append(record.bytes)
        self._places.append(record.place)
        self._weights.append(record.weight)

    def __len__(self) -> int:
        return len(self._bytes)

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        name, captions = json.loads(self._texts[self._ends[index] : self._ends[index + 1]])
        source, path, joined = self._holders[self._numbers[index]]
        path, captions = path + name if joined else path, tuple(map(tuple, captions))
        place, weight = self._places[index], self._weights[index]
        return Record(path, name, captions, self._bytes[index], source, place, weight)


def write_skipped(skips: Iterable[Skip], path: str) -> None:
    """Write skipped entries as JSON lines of path and reason, replacing the file."""
    with writing(path, "w", encoding="utf-8") as file:
        file.writelines(_line(skip) for skip in skips)


def merge_skipped(skips: Iterable[Skip], path: str) -> None:
    """Write skipped entries as `write_skipped` does, and keep other entries that the file already has."""
    skips = list(skips)
    paths = {skip.path for skip in skips}
    earlier = read_skipped(path) if os.path.exists(path) else []
    write_skipped([*skips, *(skip for skip in earlier if skip.path not in paths)], path)


def read_skipped(path: str) -> list[Skip]:
    """Read skipped entries from JSON lines, without duplicates. Incomplete lines of killed processes are ignored."""
    with open(path, "rb") as file:
        return list(dict.fromkeys(filter(None, map(_read_line, file))))


class SkipLog:
    """A file to which several processes append skipped entries, each image once.

    Each process reads each line once, so that many workers add little work.
    """

    def __init__(self, path: str):
        self.path = path
        self._known: set[str] = set()  # paths in the file
        self._read = 0  # bytes that were read

    def append(self, skip: Skip) -> int:
        """Append an entry unless the file contains its path; return the number of entries in the file."""
        with open(self.path, "a+b") as file:
            lock_file(file)
            end = file.seek(0, os.SEEK_END)
            if end < self._read:  # the file was replaced
                self._known, self._read = set(), 0
            file.seek(self._read)
            lines = file.read()
            self._known.update(each.path for each in map(_read_line, lines.splitlines()) if each)
            if skip.path not in self._known:
                torn = b"" if end == 0 or (lines or b"\n").endswith(b"\n") else b"\n"
                end += file.write(torn + _line(skip).encode())
                self._known.add(skip.path)
            self._read = end
        return len(self._known)


def _line(skip: Skip) -> str:
    return json.dumps(dataclasses.asdict(skip)) + "\n"


def _read_line(line: bytes) -> Skip | None:
    try:
        row = json.loads(line)
        return Skip(str(row["path"]), str(row["reason"]))
    except (ValueError, KeyError, TypeError):
        return None


def totals(skips: Iterable[Skip]) -> str:
    """Count skipped entries by kind of reason, most frequent first: "9 can't be decoded, 3 no caption"."""
    kinds: dict[str, int] = {}
    for skip in skips:
        kind = re.split(r": |; ", skip.reason, maxsplit=1)[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 of names, file sizes and captions, for the key of data computed from the records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.name, record.bytes, record.captions]).encode())
    return digest.hexdigest()


def fingerprints(records: Iterable[Record]) -> dict[str, str]:
    """SHA-256 of names and file sizes, and another of captions, so that a key shows which of the two changed."""
    pictures, captions = hashlib.sha256(), hashlib.sha256()
    for record in records:
        pictures.update(json.dumps([record.name, record.bytes]).encode())
        captions.update(json.dumps(record.captions).encode())
    return {"pictures": pictures.hexdigest(), "captions": captions.hexdigest()}
