"""Writing a latent cache, in parts, by any number of processes; an interrupted cache is continued."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stipple_core.data.records.records import Record, fingerprints
from stipple_core.files.hashing import file_sha256
from stipple_core.latent_cache.arrays import pack, save_array, save_ragged
from stipple_core.latent_cache.cache_files import (
    FORMAT,
    as_json,
    check_key,
    part_path,
    parts,
    read_cache_json,
    row_sum,
    write_cache_json,
)

DTYPES = ("float32", "float16")
MAX_PARTS = 4096  # approximate, of each kind: each file is memory-mapped, and systems allow about 65,000 mappings
ENDINGS = {"moments": [".npy"], "contexts": [".npy", ".starts.npy"]}  # of the files of a part


class LatentCacheWriter:
    """Writes the parts of a latent cache that are assigned to one process.

    For each part of `writer.missing("moments")`, call `writer.add_moments(part, ...)`; do the same for "contexts". When
    all processes have finished, call `writer.close(...)` in each. Parts that are complete on disk, by their SHA-256,
    are not missing.

    Args:
        folder: the folder of the cache, created if necessary.
        rank, world: the number of this process, and of all processes.
        key: what the moments and contexts depend on, as JSON values.
        records: the records, in the order of the index.
        dtype: of the moments, "float32" or "float16".
        part_size: records or captions per part. None: 1,024, or more to have at most about 4,096 parts.
        contexts: False stores only the captions, if the text encoder is trained or the contexts are too large.

    Raises:
        ValueError: the folder contains a cache with another key, dtype or part size, or of other records.
    """

    def __init__(
        self,
        folder: str,
        rank: int,
        key: Mapping[str, Any],
        records: Sequence[Record],
        world: int = 1,
        dtype: str = "float32",
        part_size: int | None = None,
        contexts: bool = True,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"moments can't be stored as {dtype!r}; use one of {', '.join(DTYPES)}")
        self.folder, self.rank, self.world, self.records = folder, rank, world, records
        self.dtype, self.contexts = dtype, contexts
        self.part_size = part_size or max(1024, 1 << (-(-len(records) // MAX_PARTS) - 1).bit_length())
        self.captions = sorted({text for record in records for texts in record.captions for text in texts})
        settings = {"moments_dtype": dtype, "part_size": self.part_size}
        of_records = {} if {"pictures", "captions"} <= key.keys() else fingerprints(records)
        self.key = {**of_records, **as_json(key), **settings}
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "key.json")
        if os.path.exists(path):
            check_key(folder, read_cache_json(path), self.key)
        else:
            write_cache_json(self.key, path)

    def missing(self, kind: str) -> list[range]:
        """This process's incomplete parts: for "moments" ranges of records, for "contexts" ranges of `.captions`."""
        return [part for part in self._parts(kind)[self.rank :: self.world] if not self._is_complete(kind, part)]

    def add_moments(self, part: range, moments: Sequence[torch.Tensor | None]) -> None:
        """Write the moments of a part: for each record [1 or 2, 2c, h, w], or None if it is not usable.

        Raises:
            ValueError: their number is wrong, or they are not finite in the dtype of the files.
        """
        if len(moments) != len(part):
            raise ValueError(f"part {part.start} to {part.stop - 1} has {len(part)} rows, not {len(moments)}")
        stored = [None if each is None else _cast(each, self.dtype) for each in moments]
        usable = [each for each in stored if each is not None]
        for each in usable:
            finite = np.isfinite(each)
            finite[:, each.shape[1] // 2 :] |= np.isneginf(each[:, each.shape[1] // 2 :])  # -inf for points
            self._check(part, finite, each.dtype)
        shape = usable[0].shape if usable else (0, 0, 0, 0)
        if any(each.shape[:2] != shape[:2] for each in usable):
            raise ValueError(f"part {part.start} to {part.stop - 1} mixes moments of {shape[:2]} and other channels")
        values = np.concatenate([np.zeros(0, self.dtype), *(each.ravel() for each in usable)])
        save_array(self._path("moments", part) + ".npy", values)
        sizes = [[0, 0] if each is None else list(each.shape[2:]) for each in stored]
        sums = [None if each is None else [row_sum(view) for view in each] for each in stored]
        self._complete("moments", part, {"flips": shape[0], "channels": shape[1], "sizes": sizes, "row_sums": sums})

    def add_contexts(self, part: range, contexts: Sequence[torch.Tensor]) -> None:
        """Write the contexts of a part: for each caption its tokens [l, d], without masked ones."""
        if len(contexts) != len(part):
            raise ValueError(f"part {part.start} to {part.stop - 1} has {len(part)} rows, not {len(contexts)}")
        packed = pack([_cast(context, "float16") for context in contexts])
        self._check(part, np.isfinite(packed.values), packed.values.dtype)
        save_ragged(self._path("contexts", part), packed)
        self._complete("contexts", part, {"row_sums": [[row_sum(packed[row])] for row in range(len(packed))]})

    def close(self, null_tokens: torch.Tensor | None) -> None:
        """Write the index, in the process of rank 0, after all processes have added their parts.

        Args:
            null_tokens: the context [l, d] of the empty caption, without masked tokens; None if contexts are not
                stored.

        Raises:
            ValueError: a part is missing, or no record is usable.
        """
        if self.rank != 0:
            return
        markers = [self._marker("moments", part) for part in self._parts("moments")]
        contexts = [self._marker("contexts", part) for part in self._parts("contexts")]
        shapes = {(marker["flips"], marker["channels"]) for marker in markers} - {(0, 0)}
        if len(shapes) != 1:
            raise ValueError(f"{self.folder} has moments of flips and channels {sorted(shapes)}; make a new cache")
        sizes = np.array([size for marker in markers for size in marker["sizes"]], dtype=np.int32)  # [records, 2]
        ((flips, channels),) = shapes
        save_array(os.path.join(self.folder, "sizes.npy"), sizes)
        for kind, each in [("moments", markers)] + [("contexts", contexts)] * self.contexts:
            sums = [row or [0] * flips for marker in each for row in marker["row_sums"]]
            save_array(os.path.join(self.folder, f"{kind}_sums.npy"), np.array(sums, dtype=np.uint32))
        ends = np.cumsum(flips * channels * sizes.astype(np.int64).prod(1))
        save_array(os.path.join(self.folder, "ends.npy"), ends)
        if null_tokens is not None:
            save_array(os.path.join(self.folder, "null.npy"), _cast(null_tokens, "float16"))
        self._save_captions()
        for leftover in glob.glob(os.path.join(glob.escape(self.folder), "*.tmp-*")):
            os.remove(leftover)
        index = {"format": FORMAT, "records": len(self.records), "captions": len(self.captions)}
        index |= {"contexts": self.contexts, "flips": flips, "channels": channels}
        write_cache_json(index, os.path.join(self.folder, "index.json"))

    def _save_captions(self) -> None:
        numbers = {caption: number for number, caption in enumerate(self.captions)}
        templates = [np.array([numbers[text] for text in texts]) for each in self.records for texts in each.captions]
        starts = np.cumsum([0, *(len(record.captions) for record in self.records)])
        texts = [np.frombuffer(caption.encode(), dtype=np.uint8) for caption in self.captions]
        save_ragged(os.path.join(self.folder, "captions"), pack(texts))
        save_ragged(os.path.join(self.folder, "templates"), pack(templates))
        save_array(os.path.join(self.folder, "records.npy"), starts)

    def _parts(self, kind: str) -> list[range]:
        counts = {"moments": len(self.records), "contexts": len(self.captions) if self.contexts else 0}
        return parts(counts[kind], self.part_size)

    def _path(self, kind: str, part: range) -> str:
        return part_path(self.folder, kind, part)

    def _is_complete(self, kind: str, part: range) -> bool:
        """Whether the files of a part have the SHA-256 that its marker contains. A damaged part is written again."""
        try:
            sums = read_cache_json(self._path(kind, part) + ".json")["sha256"]
            return sums == self._sums(kind, part)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _sums(self, kind: str, part: range) -> list[str]:
        return [file_sha256(self._path(kind, part) + ending) for ending in ENDINGS[kind]]

    def _complete(self, kind: str, part: range, more: dict[str, Any]) -> None:
        marker = {"stop": part.stop, "sha256": self._sums(kind, part), **more}
        write_cache_json(marker, self._path(kind, part) + ".json")

    def _marker(self, kind: str, part: range) -> dict[str, Any]:
        path = self._path(kind, part) + ".json"
        if not os.path.exists(path):
            raise ValueError(f"{self.folder} lacks {kind} {part.start} to {part.stop - 1}; run stipple cache again")
        return read_cache_json(path)

    def _check(self, part: range, finite: np.ndarray, dtype: np.dtype) -> None:
        if not finite.all():
            raise ValueError(f"rows {part.start} to {part.stop - 1} are not finite as {dtype}; check the model")


def _cast(values: torch.Tensor, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # overflows are detected as not finite
        return values.detach().cpu().float().numpy().astype(dtype)
