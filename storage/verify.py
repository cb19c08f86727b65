"""Each picture decoded once before training, so that the order holds none that can't be used.

What was found is remembered in the run folder, and asked again only of pictures whose size or time changed:

    verified-RANK.jsonl     {"name", "bytes", "modified", "width", "height"} or {..., "reason"}, a line for each picture
"""

from __future__ import annotations

import functools
import glob
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from storage.data_config import DataConfig
from storage.images import UnusableImage, load_image, read_size
from storage.records import Record, RecordList, Records, Skip
from storage.rows import check_enough

CHUNK = 1024  # pictures between looks at the clock
PATIENCE = 10  # seconds of work that may be lost: only a verification that takes longer writes before the run begins


@dataclass(frozen=True, slots=True)
class Look:
    """What was found of a picture: the size of its upright pixels, or why it can't be used."""

    width: int = 0
    height: int = 0
    reason: str | None = None


class Memory:
    """What this and earlier runs found, by name, file size and time of change; each process adds to a file of its own.

    A torn last line, as a killed process leaves it, is not read.
    """

    def __init__(self, folder: str, rank: int = 0):
        self.path = os.path.join(folder, f"verified-{rank}.jsonl")
        self._looks: dict[tuple[str, int, int], Look] = {}
        self._new: list[str] = []
        for path in glob.glob(os.path.join(glob.escape(folder), "verified-*.jsonl")):
            with open(path, "rb") as file:
                for line in file:
                    self._recall(line)

    def get(self, record: Record) -> Look | None:
        """What is known of a picture that has not changed since."""
        return self._looks.get(_key(record))

    def add(self, record: Record, look: Look) -> None:
        """Remember; `flush` puts it on disk."""
        key = _key(record)
        self._looks[key] = look
        found = {"reason": look.reason} if look.reason else {"width": look.width, "height": look.height}
        self._new.append(json.dumps({"name": key[0], "bytes": key[1], "modified": key[2], **found}))

    def flush(self) -> None:
        """Append what is new."""
        if self._new:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + "\n".join(self._new) + "\n")  # the first one ends a line that was torn
            self._new.clear()

    def _recall(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            key = (str(row["name"]), int(row["bytes"]), int(row["modified"]))
            self._looks[key] = Look(int(row.get("width", 0)), int(row.get("height", 0)), row.get("reason"))
        except (ValueError, KeyError, TypeError):
            return


def look_at(records: Sequence[Record], memory: Memory, share: tuple[int, int] = (0, 1)) -> list[Look]:
    """Decode this process's share of the records, in threads, and say what was found of each.

    Args:
        records: of all processes.
        memory: what it knows is not decoded again; what is new goes there.
        share: rank and number of processes; the share is records[rank::number].
    """
    rank, world = share
    own, looks, flushed = range(rank, len(records), world), [], time.monotonic()
    bar = tqdm(total=len(own), desc="verifying images", unit="img", delay=3, disable=rank != 0)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for first in range(0, len(own), CHUNK):
            chunk = [records[index] for index in own[first : first + CHUNK]]
            known = [memory.get(record) for record in chunk]
            found = threads.map(_decode, (record for record, look in zip(chunk, known, strict=True) if look is None))
            for record, look in zip(chunk, known, strict=True):
                if look is None:
                    look = next(found)
                    memory.add(record, look)
                looks.append(look)
            bar.update(len(chunk))
            if time.monotonic() - flushed > PATIENCE:
                memory.flush()
                flushed = time.monotonic()
    return looks


def read_sizes(records: Sequence[Record], share: tuple[int, int] = (0, 1)) -> list[Look]:
    """As `look_at`, by headers alone, where nothing is verified."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(_read_header, (records[i] for i in range(share[0], len(records), share[1]))))


def without_bad(records: Records, train: Sequence[Look], validation: Sequence[Look], config: DataConfig) -> Records:
    """The records that can be used; the others are among the skipped ones, with their reasons.

    Raises ValueError if more than `max_bad_fraction` of all can't be used.
    """
    skipped = list(records.skipped)
    kept = []
    for part, looks in ((records.train, train), (records.validation, validation)):
        pairs = list(zip(part, looks, strict=True))
        skipped += [Skip(record.name, look.reason) for record, look in pairs if look.reason]
        kept.append(RecordList(record for record, look in pairs if not look.reason))
    check_enough(config, len(kept[0]), len(kept[1]), skipped)
    return Records(*kept, skipped)


def _decode(record: Record) -> Look:
    try:
        image = load_image(record.open())
    except UnusableImage as error:
        return Look(reason=str(error))
    return Look(*image.size)


def _read_header(record: Record) -> Look:
    try:
        return Look(*read_size(record.open()))
    except UnusableImage:
        return Look(1, 1)  # some shape, for whoever stands in for it


def _key(record: Record) -> tuple[str, int, int]:
    shared = record.source is not None
    return record.name, record.bytes, _modified_once(record.path) if shared else _modified(record.path)


def _modified(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0  # not here, or behind a URL


_modified_once = functools.lru_cache(_modified)  # a shard holds thousands of pictures
