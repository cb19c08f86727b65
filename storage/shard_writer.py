"""The writing side of the latent cache, and the names of its files; `storage.shards` says what they hold."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from storage.folder import Record, fingerprint
from storage.ragged import pack, save_array, save_json, save_ragged

FORMAT = 1
DTYPES = ("float32", "float16")
OWN_KEYS = ("moments_dtype", "part_size", "records")  # what the writer adds to the key


class ShardWriter:
    """One process's share of a latent cache.

    For each part of writer.missing("moments"): writer.add_moments(part, ...); the same for "contexts"; then, when all
    processes are done, writer.close(...) in each. What is complete on disk is not asked for again.

    Args:
        folder: of the cache; made if need be.
        rank, world: this process, and how many share the work.
        key: what the moments and contexts depend on, as JSON values.
        records: as scanned; their order is the index.
        dtype: of the moments, "float32" or "float16".
        part_size: records, or captions, per part.

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
        part_size: int = 1024,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"moments can't be stored as {dtype!r}; use one of {', '.join(DTYPES)}")
        self.folder, self.rank, self.world, self.records = folder, rank, world, records
        self.dtype, self.part_size = dtype, part_size
        self.captions = sorted({text for record in records for texts in record.captions for text in texts})
        own = {"moments_dtype": dtype, "part_size": part_size, "records": fingerprint(records)}
        self.key = {**as_json(key), **own}
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "key.json")
        if os.path.exists(path):
            check_key(folder, read_json(path), self.key)
        else:
            save_json(path, self.key)

    def missing(self, kind: str) -> list[range]:
        """This process's parts still to make: of "moments", ranges of records; of "contexts", of `.captions`."""
        return [part for part in self._parts(kind)[self.rank :: self.world] if not self._is_complete(kind, part)]

    def add_moments(self, part: range, moments: torch.Tensor, unusable: Sequence[int] = ()) -> None:
        """Write a part's moments [n, 1 or 2, 2c, h, w]; `unusable` lists indices of records whose rows mean nothing."""
        stored = _cast(moments, self.dtype)
        hidden = set(unusable)
        usable = [row for row, index in enumerate(part[: len(stored)]) if index not in hidden]
        values = stored[usable]
        logvar = values[:, :, values.shape[2] // 2 :]
        logvar[np.isneginf(logvar)] = 0  # allowed: the posterior of a codebook is a point
        self._check(part, len(stored), values)
        save_array(self._path("moments", part) + ".npy", stored)
        self._complete("moments", part, {"unusable": sorted(unusable), "shape": list(stored.shape[1:])})

    def add_contexts(self, part: range, contexts: Sequence[torch.Tensor]) -> None:
        """Write a part's contexts: for each caption its tokens [l, d], without those that the mask hides."""
        packed = pack([_cast(context, "float16") for context in contexts])
        self._check(part, len(packed), packed.values)
        save_ragged(self._path("contexts", part), packed)
        self._complete("contexts", part, {})

    def close(self, null_tokens: torch.Tensor) -> None:
        """Write the index, in the process of rank 0, after all others have added their parts.

        Args:
            null_tokens: the context [l, d] of the empty caption, without masked tokens.

        Raises ValueError if a part is missing.
        """
        if self.rank != 0:
            return
        markers = {kind: [self._marker(kind, part) for part in self._parts(kind)] for kind in ("moments", "contexts")}
        shapes = {tuple(marker["shape"]) for marker in markers["moments"]}
        if len(shapes) != 1:
            raise ValueError(f"{self.folder} holds moments of shapes {sorted(shapes)}; delete it and start again")
        save_array(os.path.join(self.folder, "null.npy"), _cast(null_tokens, "float16"))
        self._save_captions()
        unusable = [index for marker in markers["moments"] for index in marker["unusable"]]
        for leftover in glob.glob(os.path.join(glob.escape(self.folder), "*.tmp-*")):
            os.remove(leftover)
        index = {"format": FORMAT, "records": len(self.records), "captions": len(self.captions), "unusable": unusable}
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
        return parts(len(self.records if kind == "moments" else self.captions), self.part_size)

    def _path(self, kind: str, part: range) -> str:
        return part_path(self.folder, kind, part)

    def _is_complete(self, kind: str, part: range) -> bool:
        return os.path.exists(self._path(kind, part) + ".json")

    def _complete(self, kind: str, part: range, more: dict[str, Any]) -> None:
        save_json(self._path(kind, part) + ".json", {"stop": part.stop, **more})

    def _marker(self, kind: str, part: range) -> dict[str, Any]:
        if not self._is_complete(kind, part):
            raise ValueError(f"{self.folder} lacks {kind} {part.start} to {part.stop - 1}; run cache_latents.py again")
        return read_json(self._path(kind, part) + ".json")

    def _check(self, part: range, rows: int, values: np.ndarray) -> None:
        if rows != len(part):
            raise ValueError(f"part {part.start} to {part.stop - 1} has {len(part)} rows, not {rows}")
        if not np.isfinite(values).all():
            raise ValueError(f"rows {part.start} to {part.stop - 1} are not finite as {values.dtype}; check the model")


def _cast(values: torch.Tensor, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        return values.detach().cpu().float().numpy().astype(dtype)


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
    """A JSON file of ours."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def check_key(folder: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """ValueError that names each entry in which the keys differ."""
    changed = [name for name in {**stored, **expected} if stored.get(name) != expected.get(name)]
    if changed:
        changes = "; ".join(f"{name} was {stored.get(name)!r}, is {expected.get(name)!r}" for name in changed)
        raise ValueError(f"latent cache {folder} was made otherwise: {changes}; make it again, in another folder")
