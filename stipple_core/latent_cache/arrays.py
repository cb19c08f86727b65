"""Memory-mapped arrays: .npy files that are written atomically, and arrays with rows of unequal length.

.npy is used instead of safetensors because numpy reads a row as a view, without a call into another library (a latent
takes 7 us instead of 44 us). Every array has its own header, and `allow_pickle=False` makes reading safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stipple_core.files.atomic import writing


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of unequal length in one array: row i is values[starts[i]:starts[i + 1]]."""

    values: np.ndarray  # [total, ...]
    starts: np.ndarray  # [rows + 1] int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]


def pack(rows: Sequence[np.ndarray]) -> Ragged:
    """Pack at least one row [l_i, ...] of one dtype into a Ragged."""
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(np.concatenate(rows), starts)


def save_array(path: str, array: np.ndarray) -> None:
    """Write an array as .npy, atomically and durably. Raises OSError, naming the file."""
    try:
        with writing(path) as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        if error.filename is None:  # numpy's error has neither number nor file name
            raise OSError(f"{path} can't be written ({error}); is the disk full?") from None
        raise


def save_ragged(path: str, ragged: Ragged) -> None:
    """Write a Ragged as PATH.npy and PATH.starts.npy."""
    save_array(f"{path}.npy", ragged.values)
    save_array(f"{path}.starts.npy", ragged.starts)


def map_array(path: str) -> np.ndarray:
    """Memory-map a .npy file as a read-only array. Raises ValueError if it is damaged or truncated."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # slicing an np.memmap is slow
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); run stipple cache again, which writes it anew") from None


def map_ragged(path: str) -> Ragged:
    """Memory-map what `save_ragged` wrote."""
    return Ragged(map_array(f"{path}.npy"), map_array(f"{path}.starts.npy"))
