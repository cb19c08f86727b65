"""Reading a latent cache: memory-mapped posterior moments of all images and contexts of all captions.

`CachedLatents` draws captions and flips by the same addresses as `ImageDataset`. Images that could not be decoded are
omitted. `stipple_core.latent_cache.cache_files` describes the files.
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
from stipple_core.latent_cache.cache_files import (
    FORMAT,
    WRITER_KEYS,
    as_json,
    check_key,
    part_path,
    parts,
    read_cache_json,
    row_sum,
)
from stipple_core.randomness import generator


@dataclass(frozen=True, slots=True)
class CachedSample:
    """One captioned image, as moments and context."""

    moments: torch.Tensor  # [2c, h, w] float32; of the mirrored image if a flip was drawn
    tokens: torch.Tensor | None  # [L, d] float16; None if contexts are not stored
    index: int  # among the usable records
    caption: str


@dataclass(frozen=True, slots=True)
class CachedBatch:
    """Cached samples of one micro-batch, their contexts padded to the longest."""

    moments: torch.Tensor  # [B, 2c, h, w] float32
    tokens: torch.Tensor | None  # [B, L, d] float32, zero where masked; None if contexts are not stored
    mask: torch.Tensor | None  # [B, L] bool, true where there is a token
    indices: torch.Tensor  # [B] int64
    captions: list[str]

    def pin_memory(self) -> CachedBatch:
        """Move the tensors to pinned memory; called by the loader for asynchronous copies to a GPU."""
        pinned = replace(self, moments=self.moments.pin_memory())
        return pinned if self.tokens is None else replace(pinned, tokens=self.tokens.pin_memory())


class DamagedCache(ValueError):
    """A row of a latent cache does not have the checksum that was written with it."""


class CachedLatents(Dataset):
    """A complete latent cache: `cache[epoch, index]` is a CachedSample. Opening it maps the files without reading them.

    `index` counts the usable records; `usable` [N] contains their numbers among all records.

    Args:
        folder: the folder of the cache.
        expected_key: the key that the cache must have. None accepts any.
        seed: the run's seed, from which captions and flips are drawn.

    Raises:
        FileNotFoundError: the cache is missing or incomplete.
        ValueError: its key differs (the message names the entries), or it is damaged.
    """

    def __init__(self, folder: str, expected_key: Mapping[str, Any] | None = None, seed: int = 0):
        path = os.path.join(folder, "index.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{folder} is not a complete latent cache (no index.json); run stipple cache")
        index, self.key = read_cache_json(path), read_cache_json(os.path.join(folder, "key.json"))
        if index["format"] != FORMAT:
            raise ValueError(f"latent cache {folder} has format {index['format']}, not {FORMAT}; make a new one")
        self.part_size = self.key["part_size"]
        if expected_key is not None:
            of_writer = {name: self.key[name] for name in WRITER_KEYS}
            check_key(folder, self.key, {**of_writer, **as_json(expected_key)})
        self.folder, self.seed = folder, seed
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each mapped file needs a descriptor, 3 per part
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
        return CachedLatents, (self.folder, None, self.seed)  # workers map the files again instead of copying them

    def __getitem__(self, address: tuple[int, int]) -> CachedSample:
        epoch, index = address
        record = int(self.usable[index])
        flip = self.flips and draw_flip(self.seed, epoch, index)
        number = int(draw_from_nested(self.captions_of(record), generator(self.seed, "caption", epoch, index)))
        tokens = None if self.null_tokens is None else self.context(number)
        return CachedSample(self.moments(record, flip), tokens, index, self.caption(number))

    def buckets(self) -> np.ndarray:
        """The bucket [N] of each usable record: the number of its size among all sizes, ordered by width."""
        return np.unique(self.sizes[self.usable][:, ::-1], axis=0, return_inverse=True)[1].ravel()

    def moments(self, record: int, flip: bool = False) -> torch.Tensor:
        """Posterior moments [2c, h, w] of a record, or of its mirrored image; float32. Raises DamagedCache."""
        part, (height, width) = record // self.part_size, self.sizes[record].tolist()
        area = self.channels * height * width
        end = int(self._ends[record]) - self._end(part * self.part_size)
        start = end - 2 * area if self.flips and not flip else end - area
        values = self._moments[part][start : start + area]
        self._check("moments", record, values, int(flip))
        return torch.from_numpy(values.astype(np.float32).reshape(self.channels, height, width))

    def captions_of(self, record: int) -> list[np.ndarray]:
        """The numbers of a record's captions, one array for each template."""
        return [self._templates[template] for template in range(self._records[record], self._records[record + 1])]

    def caption(self, number: int) -> str:
        """The text of a caption."""
        return self._captions[number].tobytes().decode()

    def context(self, number: int) -> torch.Tensor:
        """The tokens [L, d] of a caption, float16. Raises DamagedCache."""
        part, row = divmod(number, self.part_size)
        tokens = np.array(self._contexts[part][row])
        self._check("contexts", number, tokens, 0)
        return torch.from_numpy(tokens)

    def _check(self, kind: str, row: int, values: np.ndarray, view: int) -> None:
        if row_sum(values) != self._sums[kind][row, view]:
            first = row // self.part_size * self.part_size
            path = part_path(self.folder, kind, range(first, first + 1))
            raise DamagedCache(f"{path}.npy is damaged at row {row - first}; run stipple cache again to fix it")

    def _end(self, stop: int) -> int:
        """The number of values of the first `stop` records."""
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
    """Combine samples to a batch, with contexts padded to the longest."""
    moments = torch.from_numpy(np.stack([sample.moments.numpy() for sample in samples]))  # [B, 2c, h, w]
    indices = torch.tensor([sample.index for sample in samples])
    captions = [sample.caption for sample in samples]
    if samples[0].tokens is None:
        return CachedBatch(moments, None, None, indices, captions)
    tokens = pad_sequence([sample.tokens for sample in samples], batch_first=True)  # [B, L, d]
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]  # [B, L]
    return CachedBatch(moments, tokens.float(), mask, indices, captions)
