"""The latent cache: posterior moments of every picture and the context of every caption, in memory-mapped shards.

    key.json                what the cache is made of; written first
    moments-00000000.npy    [n, 1 or 2, 2c, h, w] of records 0 to n-1; the second is the mirror image, with flips
    contexts-00000000.npy   [tokens of n captions, d] float16, with .starts.npy [n + 1]: the tokens that the mask keeps
    ...-00000000.json       beside each part, written after it: the part is complete
    captions, templates     the distinct captions, and which of them belong to which record
    index.json              written last, when all parts are there

Parts are ranges of records, not of processes: any number of processes can go on where others were stopped. A
caption's context is stored once, however many pictures share it. `CachedLatents` draws caption, flip and replacement
by the addresses that `ImageDataset` uses.

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

from storage.dataset import draw_flip, draw_nested, replacements
from storage.ragged import map_array, map_ragged
from storage.randomness import generator
from storage.shard_writer import FORMAT, OWN_KEYS, ShardWriter, as_json, check_key, part_path, parts, read_json

__all__ = ["CachedBatch", "CachedLatents", "CachedSample", "ShardWriter", "cached_collate"]


@dataclass(frozen=True, slots=True)
class CachedSample:
    """What training needs of one captioned image."""

    moments: torch.Tensor  # [2c, h, w] float32; of the mirror image, where a flip was drawn
    tokens: torch.Tensor  # [L, d] float16
    mask: torch.Tensor  # [L] bool, all true
    index: int  # of the record that was asked for
    caption: str


@dataclass(frozen=True, slots=True)
class CachedBatch:
    """Cached samples of one micro-batch, their contexts padded to the longest."""

    moments: torch.Tensor  # [B, 2c, h, w] float32
    tokens: torch.Tensor  # [B, L, d] float32, zero where masked
    mask: torch.Tensor  # [B, L] bool, true where there is a token
    indices: torch.Tensor  # [B] int64
    captions: list[str]

    def pin_memory(self) -> CachedBatch:
        """Called by the loader, so that the copy to a GPU does not wait."""
        return replace(self, moments=self.moments.pin_memory(), tokens=self.tokens.pin_memory())


class CachedLatents(Dataset):
    """A finished latent cache: `cache[epoch, index]` is a CachedSample. Opening maps the files and reads none of them.

    Args:
        folder: of the cache.
        expected_key: what the cache has to be made of; None takes it as it is.
        seed: the run's seed, from which captions and flips are drawn.

    Raises FileNotFoundError if the cache is missing or not complete; ValueError, naming what changed, if its key is
    another.
    """

    def __init__(self, folder: str, expected_key: Mapping[str, Any] | None = None, seed: int = 0):
        path = os.path.join(folder, "index.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{folder} is no complete latent cache (no index.json); run cache_latents.py")
        index, self.key = read_json(path), read_json(os.path.join(folder, "key.json"))
        if index["format"] != FORMAT:
            raise ValueError(f"latent cache {folder} has format {index['format']}, not {FORMAT}; make it again")
        self.part_size = self.key["part_size"]
        if expected_key is not None:
            own = {name: self.key[name] for name in OWN_KEYS}
            check_key(folder, self.key, {**own, **as_json(expected_key)})
        self.folder, self.seed, self.size = folder, seed, index["records"]
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each mapped file keeps a descriptor: 3 per part
        self.unusable = frozenset(index["unusable"])
        self._moments = [map_array(f"{name}.npy") for name in self._paths("moments", self.size)]
        self._contexts = [map_ragged(name) for name in self._paths("contexts", index["captions"])]
        self._captions = map_ragged(os.path.join(folder, "captions"))
        self._templates = map_ragged(os.path.join(folder, "templates"))
        self._records = map_array(os.path.join(folder, "records.npy"))
        self.null_tokens = torch.from_numpy(np.array(map_array(os.path.join(folder, "null.npy")))).float()  # [L, d]
        self.null_mask = torch.ones(len(self.null_tokens), dtype=torch.bool)  # [L]
        self.flips = self._moments[0].shape[1] == 2
        self.moments_shape = tuple(self._moments[0].shape[2:])  # (2c, h, w)
        self.context_dim = self.null_tokens.shape[1]

    def __len__(self) -> int:
        return self.size

    def __reduce__(self) -> tuple:
        return CachedLatents, (self.folder, None, self.seed)  # workers map the files anew: pickling would copy them

    def __getitem__(self, address: tuple[int, int]) -> CachedSample:
        epoch, index = address
        flip = self.flips and draw_flip(self.seed, epoch, index)
        for candidate in replacements(self.seed, epoch, index, self.size):
            if candidate not in self.unusable:
                number = int(draw_nested(self.captions_of(candidate), generator(self.seed, "caption", epoch, index)))
                tokens, mask = self.context(number)
                return CachedSample(self.moments(candidate, flip), tokens, mask, index, self.caption(number))
        raise ValueError(f"101 records of {self.folder} in turn are unusable; make it again from better pictures")

    def moments(self, index: int, flip: bool = False) -> torch.Tensor:
        """A record's posterior moments [2c, h, w], or its mirror image's; float32."""
        part, row = divmod(index, self.part_size)
        return torch.from_numpy(self._moments[part][row, int(flip)].astype(np.float32))

    def captions_of(self, index: int) -> list[np.ndarray]:
        """Numbers of a record's captions: an array for each template."""
        return [self._templates[template] for template in range(self._records[index], self._records[index + 1])]

    def caption(self, number: int) -> str:
        """A caption's text."""
        return self._captions[number].tobytes().decode()

    def context(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A caption's tokens [L, d], float16, and mask [L]."""
        part, row = divmod(number, self.part_size)
        tokens = torch.from_numpy(np.array(self._contexts[part][row]))
        return tokens, torch.ones(len(tokens), dtype=torch.bool)

    def _paths(self, kind: str, count: int) -> list[str]:
        return [part_path(self.folder, kind, part) for part in parts(count, self.part_size)]


def cached_collate(samples: Sequence[CachedSample]) -> CachedBatch:
    """Cached samples as a CachedBatch."""
    moments = torch.from_numpy(np.stack([sample.moments.numpy() for sample in samples]))  # [B, 2c, h, w]
    tokens = pad_sequence([sample.tokens for sample in samples], batch_first=True)  # [B, L, d]
    mask = pad_sequence([sample.mask for sample in samples], batch_first=True)  # [B, L]
    indices = torch.tensor([sample.index for sample in samples])
    return CachedBatch(moments, tokens.float(), mask, indices, [sample.caption for sample in samples])
