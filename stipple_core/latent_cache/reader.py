"""The latent cache: posterior moments of every picture and the context of every caption, in memory-mapped shards.

    key.json                what the cache is made of; written first
    moments-00000000.npy    of records 0 to n-1 in a row, each [1 or 2, 2c, h, w]; the second is the mirror image
    contexts-00000000.npy   [tokens of n captions, d] float16, with .starts.npy [n + 1]: the tokens that the mask keeps
    ...-00000000.json       beside each part, written after it: the part is complete, and its SHA-256
    sizes.npy, ends.npy     [records, 2]: (h, w) of each record's moments, (0, 0) where it has none and is left out;
                            [records]: where its numbers end, counted over all parts
    moments_sums.npy        [records, 1 or 2], and contexts_sums.npy [captions, 1]: the CRC-32 of each row, checked when
                            it is read
    captions, templates     the distinct captions, and which of them belong to which record
    index.json              written last, when all parts are there

Parts are ranges of records, not of processes: any number of processes can go on where others were stopped. A
caption's context is stored once, however many pictures share it. `CachedLatents` draws caption and flip by the
addresses that `ImageDataset` uses. Pictures that could not be decoded are left out, as if they had never been there.

Precision: moments are float32 by default and so exactly those that were added; "float16" halves the files at a relative
error of 2^-11 (mean 1.0 is off by 0.0005 at most). Contexts are always float16.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from stipple_core.data.dataset import draw_flip, draw_from_nested
from stipple_core.latent_cache.arrays import map_array, map_ragged
from stipple_core.latent_cache.writer import (
    FORMAT,
    OWN_KEYS,
    LatentCacheWriter,
    as_json,
    check_key,
    part_path,
    parts,
    read_json,
    row_sum,
)
from stipple_core.randomness import generator

__all__ = ["CachedBatch", "CachedLatents", "CachedSample", "DamagedCache", "LatentCacheWriter", "cached_collate"]


@dataclass(frozen=True, slots=True)
class CachedSample:
    """What training needs of one captioned image."""

    moments: torch.Tensor  # [2c, h, w] float32; of the mirror image, where a flip was drawn
    tokens: torch.Tensor | None  # [L, d] float16; None where contexts are not kept
    index: int  # among the usable records
    caption: str


@dataclass(frozen=True, slots=True)
class CachedBatch:
    """Cached samples of one micro-batch, their contexts padded to the longest."""

    moments: torch.Tensor  # [B, 2c, h, w] float32
    tokens: torch.Tensor | None  # [B, L, d] float32, zero where masked; None where contexts are not kept
    mask: torch.Tensor | None  # [B, L] bool, true where there is a token
    indices: torch.Tensor  # [B] int64
    captions: list[str]

    def pin_memory(self) -> CachedBatch:
        """Called by the loader, so that the copy to a GPU does not wait."""
        pinned = replace(self, moments=self.moments.pin_memory())
        return pinned if self.tokens is None else replace(pinned, tokens=self.tokens.pin_memory())


class DamagedCache(ValueError):
    """What is read from a latent cache is not what was written."""


class CachedLatents(Dataset):
    """A finished latent cache: `cache[epoch, index]` is a CachedSample. Opening maps the files and reads none of them.

    `index` counts the usable records, in the order of all records; `usable` [N] has their numbers among these.

    Args:
        folder: of the cache.
        expected_key: what the cache has to be made of; None takes it as it is.
        seed: the run's seed, from which captions and flips are drawn.

    Raises FileNotFoundError if the cache is missing or not complete; ValueError, naming what changed, if its key is
    another, or if it is damaged.
    """

    def __init__(self, folder: str, expected_key: Mapping[str, Any] | None = None, seed: int = 0):
        path = os.path.join(folder, "index.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{folder} is no complete latent cache (no index.json); run stipple cache")
        index, self.key = read_json(path), read_json(os.path.join(folder, "key.json"))
        if index["format"] != FORMAT:
            raise ValueError(f"latent cache {folder} has format {index['format']}, not {FORMAT}; make it again")
        self.part_size = self.key["part_size"]
        if expected_key is not None:
            own = {name: self.key[name] for name in OWN_KEYS}
            check_key(folder, self.key, {**own, **as_json(expected_key)})
        self.folder, self.seed = folder, seed
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each mapped file keeps a descriptor: 3 per part
        self.sizes = map_array(os.path.join(folder, "sizes.npy"))  # [records, 2]
        self.usable = np.flatnonzero(self.sizes[:, 0])
        self.flips, self.channels = index["flips"] == 2, index["channels"]
        self._ends = map_array(os.path.join(folder, "ends.npy"))
        self._moments = self._map_moments()
        kinds = ["moments"] + ["contexts"] * index["contexts"]
        self._sums = {kind: map_array(os.path.join(folder, f"{kind}_sums.npy")) for kind in kinds}
        captions = index["captions"] if index["contexts"] else 0
        self._contexts = [map_ragged(part_path(folder, "contexts", part)) for part in parts(captions, self.part_size)]
        self._captions = map_ragged(os.path.join(folder, "captions"))
        self._templates = map_ragged(os.path.join(folder, "templates"))
        self._records = map_array(os.path.join(folder, "records.npy"))
        self.null_tokens: torch.Tensor | None = None  # [L, d]
        if index["contexts"]:
            self.null_tokens = torch.from_numpy(np.array(map_array(os.path.join(folder, "null.npy")))).float()

    def __len__(self) -> int:
        return len(self.usable)

    def __reduce__(self) -> tuple:
        return CachedLatents, (self.folder, None, self.seed)  # workers map the files anew: pickling would copy them

    def __getitem__(self, address: tuple[int, int]) -> CachedSample:
        epoch, index = address
        record = int(self.usable[index])
        flip = self.flips and draw_flip(self.seed, epoch, index)
        number = int(draw_from_nested(self.captions_of(record), generator(self.seed, "caption", epoch, index)))
        tokens = None if self.null_tokens is None else self.context(number)
        return CachedSample(self.moments(record, flip), tokens, index, self.caption(number))

    def buckets(self) -> np.ndarray:
        """The bucket [N] of each usable record: the number of its size among all sizes, in order of width."""
        return np.unique(self.sizes[self.usable][:, ::-1], axis=0, return_inverse=True)[1].ravel()

    def moments(self, record: int, flip: bool = False) -> torch.Tensor:
        """A record's posterior moments [2c, h, w], or its mirror image's; float32. Raises DamagedCache."""
        part, (height, width) = record // self.part_size, self.sizes[record].tolist()
        area = self.channels * height * width
        end = int(self._ends[record]) - self._end(part * self.part_size)
        start = end - 2 * area if self.flips and not flip else end - area
        values = self._moments[part][start : start + area]
        self._check("moments", record, values, int(flip))
        return torch.from_numpy(values.astype(np.float32).reshape(self.channels, height, width))

    def captions_of(self, record: int) -> list[np.ndarray]:
        """Numbers of a record's captions: an array for each template."""
        return [self._templates[template] for template in range(self._records[record], self._records[record + 1])]

    def caption(self, number: int) -> str:
        """A caption's text."""
        return self._captions[number].tobytes().decode()

    def context(self, number: int) -> torch.Tensor:
        """A caption's tokens [L, d], float16."""
        part, row = divmod(number, self.part_size)
        tokens = np.array(self._contexts[part][row])
        self._check("contexts", number, tokens, 0)
        return torch.from_numpy(tokens)

    def _check(self, kind: str, row: int, values: np.ndarray, view: int) -> None:
        if row_sum(values) != self._sums[kind][row, view]:
            first = row // self.part_size * self.part_size
            path = part_path(self.folder, kind, range(first, first + 1))
            raise DamagedCache(f"{path}.npy is damaged at row {row - first}; run stipple cache again, which mends it")

    def _end(self, stop: int) -> int:
        """How many numbers the first `stop` records have."""
        return int(self._ends[stop - 1]) if stop else 0

    def _map_moments(self) -> list[np.ndarray]:
        mapped = []
        for part in parts(len(self.sizes), self.part_size):
            path = part_path(self.folder, "moments", part) + ".npy"
            mapped.append(map_array(path))
            if mapped[-1].shape != (self._end(part.stop) - self._end(part.start),):
                raise ValueError(f"{path} is damaged (its shape is {mapped[-1].shape}); run stipple cache again")
        return mapped


def cached_collate(samples: Sequence[CachedSample]) -> CachedBatch:
    """Cached samples as a CachedBatch."""
    moments = torch.from_numpy(np.stack([sample.moments.numpy() for sample in samples]))  # [B, 2c, h, w]
    indices = torch.tensor([sample.index for sample in samples])
    captions = [sample.caption for sample in samples]
    if samples[0].tokens is None:
        return CachedBatch(moments, None, None, indices, captions)
    tokens = pad_sequence([sample.tokens for sample in samples], batch_first=True)  # [B, L, d]
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]  # [B, L]
    return CachedBatch(moments, tokens.float(), mask, indices, captions)
