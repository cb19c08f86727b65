"""The data check: decodes each image once before training, so that unusable ones are not in the training order.

Results are cached in the run folder, and images are checked again only if their size or time has changed:

    verified-RANK.jsonl     {"name", "key", "width", "height"} or {"name", "key", "reason"}, one line for each image

The key is a hash of the image's location, its size, and the time at which its file or shard changed. It is computed
before the image is decoded, so an image that is replaced meanwhile is checked again next time. A system error, such as
too many open files, says nothing about an image: it ends the run and is not cached.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, RecordList, Records, Skip, Source
from stipple_core.data.records.rows import require_enough
from stipple_core.images.images import OUT_OF_MEMORY, UnusableImage, load_image, read_size

CHUNK = 1024  # images that are checked before results may be written
WRITE_EVERY = 10  # seconds between writes of results, so that an interrupted check loses little work


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of checking an image: the size of the upright image, or why it can't be used."""

    width: int = 0
    height: int = 0
    reason: str | None = None


class InspectionCache:
    """Inspections by this and earlier runs, by key. Each process appends to its own file.

    Incomplete lines, which killed processes leave, are ignored.
    """

    def __init__(self, folder: str, rank: int = 0):
        self.path = os.path.join(folder, f"verified-{rank}.jsonl")
        self._inspections: dict[str, Inspection] = {}
        self._new: list[str] = []
        self._states: dict[Source, dict[str, Any] | None] = {}  # a shard contains thousands of images
        for path in glob.glob(os.path.join(glob.escape(folder), "verified-*.jsonl")):
            with open(path, "rb") as file:
                for line in file:
                    self._read_line(line)

    def key(self, record: Record) -> str | None:
        """Return a key that identifies the unchanged image; None if its file does not exist. Raises OSError."""
        state = self._state(record)
        if state is None:
            return None
        identity = json.dumps([record.path, record.name, record.bytes, record.place, state])
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def get(self, key: str | None) -> Inspection | None:
        """Return the cached inspection of an image, or None."""
        return self._inspections.get(key)

    def add(self, key: str | None, name: str, inspection: Inspection) -> None:
        """Add an inspection; `flush` writes it to disk."""
        if key is None or OUT_OF_MEMORY in (inspection.reason or ""):
            return
        self._inspections[key] = inspection
        if inspection.reason:
            result = {"reason": inspection.reason}
        else:
            result = {"width": inspection.width, "height": inspection.height}
        self._new.append(json.dumps({"name": name, "key": key, **result}))

    def flush(self) -> None:
        """Append new inspections to this process's file."""
        if self._new:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + "\n".join(self._new) + "\n")  # the first newline ends an incomplete line
            self._new.clear()

    def _state(self, record: Record) -> dict[str, Any] | None:
        try:
            if record.source is None:
                stat = os.stat(record.path)
                return {"modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns}
            if record.source not in self._states:
                self._states[record.source] = record.source.state()
            return self._states[record.source]
        except FileNotFoundError:
            return None

    def _read_line(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            inspection = Inspection(int(row.get("width", 0)), int(row.get("height", 0)), row.get("reason"))
            self._inspections[str(row["key"])] = inspection
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def inspect(records: Sequence[Record], cache: InspectionCache, share: tuple[int, int] = (0, 1)) -> list[Inspection]:
    """Decode this process's share of the images in threads, and return an inspection for each.

    Args:
        records: the records of all processes.
        cache: images in it are not decoded again; new inspections are added.
        share: rank and number of processes. The share is records[rank::number].

    Raises:
        OSError: the system fails.
    """
    rank, world = share
    indices, inspections, flushed = range(rank, len(records), world), [], time.monotonic()
    bar = tqdm(total=len(indices), desc="verifying images", unit="img", delay=3, disable=rank != 0)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for first in range(0, len(indices), CHUNK):
            chunk = [records[index] for index in indices[first : first + CHUNK]]
            keys = [cache.key(record) for record in chunk]
            cached = [cache.get(key) for key in keys]
            pairs = zip(chunk, cached, strict=True)
            decoded = threads.map(_decode, [record for record, inspection in pairs if inspection is None])
            for record, key, inspection in zip(chunk, keys, cached, strict=True):
                if inspection is None:
                    inspection = next(decoded)
                    cache.add(key, record.name, inspection)
                inspections.append(inspection)
            bar.update(len(chunk))
            if time.monotonic() - flushed > WRITE_EVERY:
                cache.flush()
                flushed = time.monotonic()
    return inspections


def read_sizes(records: Sequence[Record], share: tuple[int, int] = (0, 1)) -> list[Inspection]:
    """Return the sizes of this process's share of the images from their headers, for runs without a data check."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(_read_header, (records[i] for i in range(share[0], len(records), share[1]))))


def drop_unusable(
    records: Records, train: Sequence[Inspection], validation: Sequence[Inspection], config: DataConfig
) -> Records:
    """Move records that can't be used to the skipped ones.

    Args:
        records: the result of `scan`.
        train, validation: inspections of all training and validation records.
        config: the data section of the config.

    Raises:
        ValueError: more than `max_bad_fraction` of all entries can't be used.
    """
    skipped = list(records.skipped)
    kept = []
    for part, inspections in ((records.train, train), (records.validation, validation)):
        pairs = list(zip(part, inspections, strict=True))
        skipped += [Skip(record.name, each.reason) for record, each in pairs if each.reason]
        kept.append(RecordList(record for record, each in pairs if not each.reason))
    require_enough(config, len(kept[0]), len(kept[1]), skipped)
    return Records(*kept, skipped)


def _decode(record: Record) -> Inspection:
    try:
        with record.named():
            image = load_image(record.open())
    except UnusableImage as error:
        return Inspection(reason=str(error))
    return Inspection(*image.size)


def _read_header(record: Record) -> Inspection:
    try:
        with record.named():
            return Inspection(*read_size(record.open()))
    except UnusableImage:
        return Inspection(1, 1)  # some shape, for its replacement
