"""What a tar holds, remembered: one pass over its headers writes an index, later starts read only that.

An index is a file of JSON lines in the folder `data.index`: the shard's state (size, and time or etag), a line for
each picture (name, offset, size, columns) and each thing skipped, and their number. It is written to a temporary file
and renamed. A shard whose state has changed is read again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from stipple_core.data.records.records import Skip
from stipple_core.data.records.rows import SourceImage
from stipple_core.data.sources.locations import Shard, path_digest, with_retries
from stipple_core.data.sources.tar import TEXTS, TarSample, read_samples
from stipple_core.files.atomic import locked, writing

FORMAT = 1
NO_CAPTION = "no caption: neither KEY.json nor KEY.txt beside it"


def index_of(shard: Shard, folder: str) -> str | Skip:
    """The path of a tar's index in `folder`, which is made if there is none of the shard's present state.

    Raises OSError if the shard or the folder can't be used, ValueError if the shard's server says too little.
    """
    try:
        state = {"format": FORMAT, "shard": shard.path, **shard.state()}
    except FileNotFoundError:
        return Skip(shard.name, "no such file")
    if state["bytes"] is None:
        raise ValueError(f"{shard.path}: its server does not say how large it is; use pipe:curl -sf URL")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{path_digest(shard.path)}.jsonl")
    if not _is_current(path, state):
        with locked(path):
            if not _is_current(path, state):
                _write(path, shard, state)
    return path


def images_in_tar(shard: Shard, index: str, captioned: bool) -> Iterator[SourceImage | Skip]:
    """The pictures of a tar in order of names after what can't be used of it, from its index.

    Raises ValueError if the index is damaged.
    """
    for line in _lines(index):
        name = f"{shard.name}/{line['name']}" if line["name"] else shard.name
        if "reason" in line:
            if captioned or not line["name"].lower().endswith(TEXTS):
                yield Skip(name, line["reason"] + (shard.mend if name == shard.name else ""))
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
                known = "end" in entry or "reason" in entry or entry["name"] and entry.keys() >= {"offset", "row"}
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise ValueError(f"{path} is damaged in line {number}; delete it, and it is made again")
            if "end" not in entry:
                yield entry


def _read(shard: Shard, size: int) -> tuple[list[TarSample], list[Skip]]:
    try:
        with shard.stream() as stream:
            return read_samples(stream, size)
    except ValueError as error:  # fsspec, of a server without ranges
        raise ValueError(f"{shard.path} can't be read at offsets ({error}); use pipe:curl -sf URL") from None


def _is_current(path: str, state: dict[str, Any]) -> bool:
    """Whether an index is there, whole, and of this state."""
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
