"""Records: a picture and its captions wherever it lies, and a compact list of millions of them."""

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
    """A file that holds many pictures. Small, picklable and hashable: whichever process asks opens it for itself."""

    path: str

    def open(self, place: int, size: int) -> str | IO[bytes]:
        """The picture of `size` bytes at a place: the offset in a tar, the row in a table."""

    def state(self) -> dict[str, Any]:
        """What changes when the contents do, as plain values. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Record:
    """A picture and its captions: one inner tuple for each template, holding that template's expansions."""

    path: str  # of the file, absolute; or of the shard or table that it lies in
    name: str  # within the data: relative to the data folder, with "/"; SHARD/KEY.EXT in a tar; TABLE:ROW in a table
    captions: tuple[tuple[str, ...], ...]
    bytes: int = 0  # size of the picture's file, for the fingerprint
    source: Source | None = None  # None: a file of its own
    place: int = 0  # in the source
    weight: float = 1.0  # of its loss

    def open(self) -> str | IO[bytes]:
        """What `load_image` and `read_size` take: a plain file's path, or the bytes of what lies in a larger file.

        Raises UnusableImage if there are none, OSError if they can't be reached.
        """
        return self.path if self.source is None else self.source.open(self.place, self.bytes)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put this picture's name into an OSError that names no file."""
        try:
            yield
        except OSError as error:
            if error.errno and error.filename is None:
                error.filename = self.path if self.source is None else f"{self.name} in {self.source.path}"
            raise


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that can't be used: its name in the data, or FILE:LINE of a metadata file, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Records:
    """What `scan` found, in an order that depends on the data alone."""

    train: Sequence[Record]
    validation: Sequence[Record]
    skipped: list[Skip]


class RecordList(Sequence[Record]):
    """Records in a few arrays: about 100 bytes and the text each, where a list of objects takes 600 bytes.

    The objects are made when asked for. Forked workers share the arrays, which have no reference counts to write to.
    """

    def __init__(self, records: Iterable[Record] = ()):
        self._texts = bytearray()  # JSON of name and captions, one after the other
        self._ends, self._bytes, self._places = array("q", [0]), array("q"), array("q")
        self._weights = array("d")
        self._holders, self._numbers = [], array("i")  # (source; its path, or a folder; whether the name follows)
        self._known: dict[tuple[Source | None, str, bool], int] = {}
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Add one at the end."""
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
    """Write skips as JSON lines of path and reason, in place of what is there."""
    with writing(path, "w", encoding="utf-8") as file:
        file.writelines(_line(skip) for skip in skips)


def merge_skipped(skips: Iterable[Skip], path: str) -> None:
    """Write skips as `write_skipped` does, and after them what is there of others, such as earlier runs met."""
    skips = list(skips)
    told = {skip.path for skip in skips}
    earlier = read_skipped(path) if os.path.exists(path) else []
    write_skipped([*skips, *(skip for skip in earlier if skip.path not in told)], path)


def read_skipped(path: str) -> list[Skip]:
    """The skips in a file of JSON lines, each once; a line that a killed process has torn is not read."""
    with open(path, "rb") as file:
        return list(dict.fromkeys(filter(None, map(_read_line, file))))


class SkipLog:
    """A file of skips to which processes append what they meet, each picture once, and what it holds by now.

    Each line is read once, so that 64 workers cost no more than the lines themselves.
    """

    def __init__(self, path: str):
        self.path = path
        self._known: set[str] = set()  # pictures
        self._read = 0  # bytes

    def append(self, skip: Skip) -> int:
        """Append a skip unless its picture is there, whoever wrote it; returns how many the file holds."""
        with open(self.path, "a+b") as file:
            lock_file(file)
            end = file.seek(0, os.SEEK_END)
            if end < self._read:  # written anew
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
    """How many were skipped for which kind of reason, the most frequent first: "9 can't be decoded, 3 no caption"."""
    kinds: dict[str, int] = {}
    for skip in skips:
        kind = re.split(r": |; ", skip.reason, maxsplit=1)[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def fingerprint(records: Iterable[Record]) -> str:
    """A sha256 of names, file sizes and captions: for the key of what is made from the records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.name, record.bytes, record.captions]).encode())
    return digest.hexdigest()


def fingerprints(records: Iterable[Record]) -> dict[str, str]:
    """A sha256 of names and file sizes, and one of captions: so that a key can tell which of the two changed."""
    pictures, captions = hashlib.sha256(), hashlib.sha256()
    for record in records:
        pictures.update(json.dumps([record.name, record.bytes]).encode())
        captions.update(json.dumps(record.captions).encode())
    return {"pictures": pictures.hexdigest(), "captions": captions.hexdigest()}
