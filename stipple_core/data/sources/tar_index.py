"""The index of a tar: written in one pass over its headers, and read instead of the tar at later starts.

An index is a file of JSON lines in the folder `data.index`: the shard's state (size, and time or etag), one line for
each image (name, offset, size, columns) and each skipped member, and their number. If the state of a shard has changed,
its index is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from stipple_core.data.records.records import Skip
from stipple_core.data.records.rows import SourceImage
from stipple_core.data.sources.remote_files import with_retries
from stipple_core.data.sources.shards import Shard, path_digest
from stipple_core.data.sources.tar import TEXT_FIELDS, TarSample, read_samples
from stipple_core.files.atomic import locked, writing

FORMAT = 1
NO_CAPTION = "no caption: neither KEY.json nor KEY.txt beside it"


def index_of(shard: Shard, folder: str) -> str | Skip:
    """Return the path of a tar's index in `folder`. It is written unless there is one of the shard's current state.

    Returns a Skip if the shard does not exist.

    Raises:
        OSError: the shard can't be read, or the folder can't be written.
        ValueError: the shard's server does not report its size.
    """
    try:
        state = {"format": FORMAT, "shard": shard.path, **shard.state()}
    except FileNotFoundError:
        return Skip(shard.name, "no such file")
    if state["bytes"] is None:
        raise ValueError(f"{shard.path}: its server does not report its size; use pipe:curl -sf URL")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{path_digest(shard.path)}.jsonl")
    if not _is_current(path, state):
        with locked(path):
            if not _is_current(path, state):
                _write(path, shard, state)
    return path


def images_in_tar(shard: Shard, index: str, captioned: bool) -> Iterator[SourceImage | Skip]:
    """Yield, from its index, a Skip for each unusable member of a tar, then its images ordered by name.

    Raises:
        ValueError: the index is damaged.
    """
    for line in _lines(index):
        name = f"{shard.name}/{line['name']}" if line["name"] else shard.name
        if "reason" in line:
            if captioned or not line["name"].lower().endswith(TEXT_FIELDS):
                yield Skip(name, line["reason"] + (shard.fix if name == shard.name else ""))
        elif line["row"] is None and captioned:
            yield Skip(name, NO_CAPTION)
        else:
            yield SourceImage(shard.path, name, line["row"] or {}, line["size"], shard, line["offset"])


def _lines(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        next(file)
        for number, line in enumerate(file, 2):
            try:
                entry = json.loads(line)
                valid = "end" in entry or "reason" in entry or entry["name"] and entry.keys() >= {"offset", "row"}
            except (ValueError, KeyError, TypeError):
                valid = False
            if not valid:
                raise ValueError(f"{path} is damaged in line {number}; delete it; it will be written again")
            if "end" not in entry:
                yield entry


def _read(shard: Shard, size: int) -> tuple[list[TarSample], list[Skip]]:
    try:
        with shard.stream() as stream:
            return read_samples(stream, size)
    except ValueError as error:  # raised by fsspec if the server does not support ranges
        raise ValueError(f"{shard.path} can't be read at offsets ({error}); use pipe:curl -sf URL") from None


def _is_current(path: str, state: dict[str, Any]) -> bool:
    """Whether an index exists, is complete, and has this state."""
    try:
        with open(path, "rb") as file:
            first = json.loads(file.readline())
            file.seek(-min(64, os.path.getsize(path)), os.SEEK_END)
            last = file.read()
            return first == state and b'{"end": ' in last and last.endswith(b"}\n")
    except (OSError, ValueError):
        return False


def _write(path: str, shard: Shard, state: dict[str, Any]) -> None:
    samples, skipped = with_retries(shard.path, lambda: _read(shard, state["bytes"]))
    with writing(path, "w", encoding="ascii") as file:
        file.write(json.dumps(state) + "\n")
        for skip in skipped:
            file.write(json.dumps({"name": skip.path, "reason": skip.reason}) + "\n")
        for sample in samples:
            entry = {"name": sample.name, "offset": sample.offset, "size": sample.size, "row": sample.row}
            file.write(json.dumps(entry) + "\n")
        file.write(json.dumps({"end": len(skipped) + len(samples)}) + "\n")
