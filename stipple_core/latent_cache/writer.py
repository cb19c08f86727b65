"""The writing side of the latent cache, and the names of its files; `stipple_core.latent_cache.reader` says what they hold."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stipple_core.data.records.records import Record, fingerprints
from stipple_core.latent_cache.arrays import pack, save_array, save_json, save_ragged

FORMAT = 2
DTYPES = ("float32", "float16")
OWN_KEYS = ("moments_dtype", "part_size", "pictures", "captions")  # what the writer adds to the key
MAX_PARTS = 4096  # about, of each kind: every file of a part is mapped, and systems map some 65,000
KINDS = {"moments": [".npy"], "contexts": [".npy", ".starts.npy"]}  # the files of a part


class LatentCacheWriter:
    """One process's share of a latent cache.

    For each part of writer.missing("moments"): writer.add_moments(part, ...); the same for "contexts"; then, when all
    processes are done, writer.close(...) in each. What is whole on disk, by its SHA-256 sums, is not asked for again.

    Args:
        folder: of the cache; made if need be.
        rank, world: this process, and how many share the work.
        key: what the moments and contexts depend on, as JSON values.
        records: as scanned; their order is the index.
        dtype: of the moments, "float32" or "float16".
        part_size: records, or captions, per part; None: 1,024, or more where that would make over 4,096 parts.
        contexts: false keeps the captions only, for a text encoder that is trained or whose contexts are too many.

    Raises ValueError if the folder holds a cache with another key, dtype or part size, or of other records.
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
        own = {"moments_dtype": dtype, "part_size": self.part_size}
        of_records = {} if {"pictures", "captions"} <= key.keys() else fingerprints(records)
        self.key = {**of_records, **as_json(key), **own}
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "key.json")
        if os.path.exists(path):
            check_key(folder, read_json(path), self.key)
        else:
            save_json(path, self.key)

    def missing(self, kind: str) -> list[range]:
        """This process's parts still to make: of "moments", ranges of records; of "contexts", of `.captions`."""
        return [part for part in self._parts(kind)[self.rank :: self.world] if not self._is_complete(kind, part)]

    def add_moments(self, part: range, moments: Sequence[torch.Tensor | None]) -> None:
        """Write a part's moments, of each record [1 or 2, 2c, h, w]; None for one that is not usable.

        Raises ValueError if they are too few, or not finite in the files' dtype.
        """
        if len(moments) != len(part):
            raise ValueError(f"part {part.start} to {part.stop - 1} has {len(part)} rows, not {len(moments)}")
        stored = [None if each is None else _cast(each, self.dtype) for each in moments]
        usable = [each for each in stored if each is not None]
        for each in usable:
            finite = np.isfinite(each)
            finite[:, each.shape[1] // 2 :] |= np.isneginf(each[:, each.shape[1] // 2 :])  # a codebook's are points
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
        """Write a part's contexts: for each caption its tokens [l, d], without those that the mask hides."""
        if len(contexts) != len(part):
            raise ValueError(f"part {part.start} to {part.stop - 1} has {len(part)} rows, not {len(contexts)}")
        packed = pack([_cast(context, "float16") for context in contexts])
        self._check(part, np.isfinite(packed.values), packed.values.dtype)
        save_ragged(self._path("contexts", part), packed)
        self._complete("contexts", part, {"row_sums": [[row_sum(packed[row])] for row in range(len(packed))]})

    def close(self, null_tokens: torch.Tensor | None) -> None:
        """Write the index, in the process of rank 0, after all others have added their parts.

        Args:
            null_tokens: the context [l, d] of the empty caption, without masked tokens; None if contexts are not kept.

        Raises ValueError if a part is missing, or nothing in it is usable.
        """
        if self.rank != 0:
            return
        markers = [self._marker("moments", part) for part in self._parts("moments")]
        contexts = [self._marker("contexts", part) for part in self._parts("contexts")]
        shapes = {(marker["flips"], marker["channels"]) for marker in markers} - {(0, 0)}
        if len(shapes) != 1:
            raise ValueError(f"{self.folder} holds moments of flips and channels {sorted(shapes)}; make it again")
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
        save_json(os.path.join(self.folder, "index.json"), index)

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
        """Whether a part has its marker and its files the sums that the marker says; a damaged part is made again."""
        try:
            sums = read_json(self._path(kind, part) + ".json")["sha256"]
            return sums == self._sums(kind, part)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _sums(self, kind: str, part: range) -> list[str]:
        return [_sha256(self._path(kind, part) + ending) for ending in KINDS[kind]]

    def _complete(self, kind: str, part: range, more: dict[str, Any]) -> None:
        marker = {"stop": part.stop, "sha256": self._sums(kind, part), **more}
        save_json(self._path(kind, part) + ".json", marker)

    def _marker(self, kind: str, part: range) -> dict[str, Any]:
        path = self._path(kind, part) + ".json"
        if not os.path.exists(path):
            raise ValueError(f"{self.folder} lacks {kind} {part.start} to {part.stop - 1}; run stipple cache again")
        return read_json(path)

    def _check(self, part: range, finite: np.ndarray, dtype: np.dtype) -> None:
        if not finite.all():
            raise ValueError(f"rows {part.start} to {part.stop - 1} are not finite as {dtype}; check the model")


def _cast(values: torch.Tensor, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        return values.detach().cpu().float().numpy().astype(dtype)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_sum(row: np.ndarray) -> int:
    """The CRC-32 of a row's bytes, by which who reads it knows that it is what was written."""
    return zlib.crc32(np.ascontiguousarray(row))


def parts(count: int, size: int) -> list[range]:
    """The ranges of at most `size` that make up `count` rows."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def part_path(folder: str, kind: str, part: range) -> str:
    """A part's path, without its ending."""
    return os.path.join(folder, f"{kind}-{part.start:08d}")


def as_json(key: Mapping[str, Any]) -> dict[str, Any]:
    """The key as it comes back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(dict(key)))


def read_json(path: str) -> dict[str, Any]:
    """A JSON file of ours; ValueError if it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged; delete it, and run stipple cache again") from None


def check_key(folder: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """ValueError that names each entry in which the keys differ."""
    changed = [name for name in {**stored, **expected} if stored.get(name) != expected.get(name)]
    if changed:
        changes = "; ".join(f"{name} was {stored.get(name)!r}, is {expected.get(name)!r}" for name in changed)
        raise ValueError(f"latent cache {folder} was made otherwise: {changes}; make it again, in another folder")
