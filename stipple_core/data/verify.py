"""Each picture decoded once before training, so that the order holds none that can't be used.

What was found is remembered in the run folder, and asked again only of pictures whose size or time changed:

    verified-RANK.jsonl     {"name", "key", "width", "height"} or {"name", "key", "reason"}, a line for each picture

The key is a hash of where the picture lies, its size and when that file, or the shard, has changed. It is taken before
the picture is decoded: one that is replaced meanwhile is looked at again the next time. A fault of the system, such as
too many open files, is no property of a picture: it ends the run, and is not remembered.
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

CHUNK = 1024  # pictures between looks at the clock
PATIENCE = 10  # seconds of work that may be lost: only a verification that takes longer writes before the run begins


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found of a picture: the size of its upright pixels, or why it can't be used."""

    width: int = 0
    height: int = 0
    reason: str | None = None


class InspectionCache:
    """What this and earlier runs found, by keys; each process adds to a file of its own.

    A torn last line, as a killed process leaves it, is not read.
    """

    def __init__(self, folder: str, rank: int = 0):
        self.path = os.path.join(folder, f"verified-{rank}.jsonl")
        self._looks: dict[str, Inspection] = {}
        self._new: list[str] = []
        self._states: dict[Source, dict[str, Any] | None] = {}  # a shard holds thousands of pictures
        for path in glob.glob(os.path.join(glob.escape(folder), "verified-*.jsonl")):
            with open(path, "rb") as file:
                for line in file:
                    self._recall(line)

    def key(self, record: Record) -> str | None:
        """By which a picture is known as long as it does not change; None if it is not there. Raises OSError."""
        state = self._state(record)
        if state is None:
            return None
        asked = json.dumps([record.path, record.name, record.bytes, record.place, state])
        return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()

    def get(self, key: str | None) -> Inspection | None:
        """What is known of a picture that has not changed since."""
        return self._looks.get(key)

    def add(self, key: str | None, name: str, look: Inspection) -> None:
        """Remember; `flush` puts it on disk."""
        if key is None or OUT_OF_MEMORY in (look.reason or ""):
            return
        self._looks[key] = look
        found = {"reason": look.reason} if look.reason else {"width": look.width, "height": look.height}
        self._new.append(json.dumps({"name": name, "key": key, **found}))

    def flush(self) -> None:
        """Append what is new."""
        if self._new:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n" + "\n".join(self._new) + "\n")  # the first one ends a line that was torn
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

    def _recall(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            look = Inspection(int(row.get("width", 0)), int(row.get("height", 0)), row.get("reason"))
            self._looks[str(row["key"])] = look
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def inspect(records: Sequence[Record], memory: InspectionCache, share: tuple[int, int] = (0, 1)) -> list[Inspection]:
    """Decode this process's share of the records, in threads, and say what was found of each.

    Args:
        records: of all processes.
        memory: what it knows is not decoded again; what is new goes there.
        share: rank and number of processes; the share is records[rank::number].

    Raises OSError where the system fails.
    """
    rank, world = share
    own, looks, flushed = range(rank, len(records), world), [], time.monotonic()
    bar = tqdm(total=len(own), desc="verifying images", unit="img", delay=3, disable=rank != 0)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for first in range(0, len(own), CHUNK):
            chunk = [records[index] for index in own[first : first + CHUNK]]
            keys = [memory.key(record) for record in chunk]
            known = [memory.get(key) for key in keys]
            found = threads.map(_decode, (record for record, look in zip(chunk, known, strict=True) if look is None))
            for record, key, look in zip(chunk, keys, known, strict=True):
                if look is None:
                    look = next(found)
                    memory.add(key, record.name, look)
                looks.append(look)
            bar.update(len(chunk))
            if time.monotonic() - flushed > PATIENCE:
                memory.flush()
                flushed = time.monotonic()
    return looks


def read_sizes(records: Sequence[Record], share: tuple[int, int] = (0, 1)) -> list[Inspection]:
    """As `inspect`, by headers alone, where nothing is verified."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(_read_header, (records[i] for i in range(share[0], len(records), share[1]))))


def drop_unusable(
    records: Records, train: Sequence[Inspection], validation: Sequence[Inspection], config: DataConfig
) -> Records:
    """The records that can be used; the others are among the skipped ones, with their reasons.

    Raises ValueError if more than `max_bad_fraction` of all can't be used.
    """
    skipped = list(records.skipped)
    kept = []
    for part, looks in ((records.train, train), (records.validation, validation)):
        pairs = list(zip(part, looks, strict=True))
        skipped += [Skip(record.name, look.reason) for record, look in pairs if look.reason]
        kept.append(RecordList(record for record, look in pairs if not look.reason))
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
        return Inspection(1, 1)  # some shape, for whoever stands in for it
