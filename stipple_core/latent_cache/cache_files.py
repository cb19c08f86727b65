"""The files of a latent cache, their names, the cache's key, and checksums of rows.

    key.json                what the cache was computed from; written first
    moments-00000000.npy    the moments of a part: records 0 to n-1, each [1 or 2, 2c, h, w]; the second is mirrored
    contexts-00000000.npy   [tokens of n captions, d] float16, with .starts.npy [n + 1]; without masked tokens
    ...-00000000.json       beside each part, written after it: the part is complete, with its SHA-256
    sizes.npy, ends.npy     [records, 2]: (h, w) of each record's moments, (0, 0) for an unusable record;
                            [records]: where its values end, counted over all parts
    moments_sums.npy        [records, 1 or 2], and contexts_sums.npy [captions, 1]: the CRC-32 of each row, checked when
                            it is read
    captions, templates     the distinct captions, and which of them belong to which record
    index.json              written last, when all parts are complete

A part is a range of records or captions, independent of processes: any number of processes can continue an interrupted
cache. The context of a caption is stored once, even if many images share it.

Moments are float32 by default, and then exactly those that were added. "float16" halves the files at a relative error
of 2^-11. Contexts are always float16.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from stipple_core.files.atomic import writing
from stipple_core.files.json_file import read_json

FORMAT = 2
WRITER_KEYS = ("moments_dtype", "part_size", "pictures", "captions")  # entries that the writer adds to the key


def row_sum(row: np.ndarray) -> int:
    """The CRC-32 of a row's bytes, which detects damage when the row is read."""
    return zlib.crc32(np.ascontiguousarray(row))


def parts(count: int, size: int) -> list[range]:
    """Split `count` rows into ranges of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def part_path(folder: str, kind: str, part: range) -> str:
    """The path of a part's files, without extension."""
    return os.path.join(folder, f"{kind}-{part.start:08d}")


def as_json(key: Mapping[str, Any]) -> dict[str, Any]:
    """The key as it is read back from a JSON file, with lists instead of tuples."""
    return json.loads(json.dumps(dict(key)))


def read_cache_json(path: str) -> dict[str, Any]:
    """Read a JSON file of a cache. Raises FileNotFoundError, or ValueError if it is damaged."""
    return read_json(path, fix="delete it, and run stipple cache again")


def write_cache_json(value: Mapping[str, Any], path: str) -> None:
    """Write a JSON file of a cache, in the order of the entries; atomically and durably."""
    with writing(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1))


def check_key(folder: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a ValueError that names each entry in which the keys differ."""
    changed = [name for name in {**stored, **expected} if stored.get(name) != expected.get(name)]
    if changed:
        changes = "; ".join(f"{name} was {stored.get(name)!r}, is {expected.get(name)!r}" for name in changed)
        raise ValueError(
            f"latent cache {folder} was made from other data or settings: {changes}; make a new one in another folder"
        )
