"""Arrays on disk that are mapped, not read: .npy files written atomically, and rows of unequal length over them.

Why .npy and not safetensors: both map, but numpy's rows are views without a call into another library for each (a
latent in 7 us against 44 us), every array carries its own header, and `allow_pickle=False` leaves nothing to execute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from stipple_core.files.atomic import writing


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of unequal length, packed: row i is values[starts[i]:starts[i + 1]]."""

    values: np.ndarray  # [total, ...]
    starts: np.ndarray  # [rows + 1] int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]


def pack(rows: Sequence[np.ndarray]) -> Ragged:
    """Rows [l_i, ...] of one dtype as a Ragged; there must be at least one row."""
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(np.concatenate(rows), starts)


def save_array(path: str, array: np.ndarray) -> None:
    """Write an array as .npy, atomically and durably."""
    _save(path, lambda file: np.save(file, array, allow_pickle=False))


def save_json(path: str, value: Any) -> None:
    """Write JSON, atomically and durably."""
    _save(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def save_ragged(path: str, ragged: Ragged) -> None:
    """Write PATH.npy and PATH.starts.npy."""
    save_array(f"{path}.npy", ragged.values)
    save_array(f"{path}.starts.npy", ragged.starts)


def map_array(path: str) -> np.ndarray:
    """A .npy file as a read-only array on the page cache; ValueError if it is damaged or cut short."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # np.memmap's own slicing is slow
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); run stipple cache again, which makes it anew") from None


def map_ragged(path: str) -> Ragged:
    """What `save_ragged` wrote, mapped."""
    return Ragged(map_array(f"{path}.npy"), map_array(f"{path}.starts.npy"))


def _save(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    try:
        with writing(path) as file:
            write(file)
    except OSError as error:
        if error.filename is None:  # numpy tells how many bytes, not where
            raise OSError(f"{path} can't be written ({error}); is the disk full?") from None
        raise
