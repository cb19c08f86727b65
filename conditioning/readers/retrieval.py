"""Pictures like the wanted one as what a model reads (Blattmann et al. 2022, arXiv:2204.11824): retrieved embeddings.

Trained with the neighbors of the picture itself, asked with those of a prompt or of a picture: what the model need not
know by heart is looked up. In training no picture is told of itself: where the database holds the pictures that are
trained on, it knows them by their names in the folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.combined import Widths
from stipple_core.embedders import EmbedderConfig, build_embedder
from stipple_core.files.weights import read_weights

ROWS = 1 << 18  # of the database at a time: 1 GiB of float32 scores for 1,000 queries
EMBEDDINGS = "embeddings"  # the tensor in a database
NAMES = "names.json"  # beside it: those of the pictures, in its order


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Where neighbors come from, and how many.

    Raises:
        ValueError: there are no neighbors.
    """

    encoder: EmbedderConfig = field(default_factory=EmbedderConfig)  # the one that made the database
    database: str = ""  # a file that stipple embed has written, its NAMES beside it
    neighbors: int = 4  # k tokens, the nearest first
    query: bool = False  # one token more, the first: the embedding that was searched for

    def __post_init__(self):
        if self.neighbors < 1:
            raise ValueError(f"retrieval.neighbors {self.neighbors} must be at least 1; Blattmann et al. take 4")


class RetrievalReader(nn.Module):
    """Given.image, or Given.prompts where there is none -> Context with tokens [B, k, d]: embeddings of neighbors.

    Whoever is dropped has zeros. The database stays the file that the config names: another one may take its place.
    """

    reads = frozenset({"image"})
    reads_prompts = True
    optional = reads  # prompts are searched for where no picture is given
    trainable = False
    Config = RetrievalConfig

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.embedder = build_embedder(config.encoder)
        path = config.database and os.path.abspath(config.database)  # a model is opened in other folders, too
        self.config = replace(config, encoder=self.embedder.config, database=path)
        self.widths = Widths(tokens=self.embedder.dim)

    @cached_property
    def database(self) -> Tensor:
        """[N, d]. Raises FileNotFoundError or ValueError in one line."""
        return open_database(self.config.database, self.embedder.dim, self.config.neighbors)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Rows of the database by the names of its pictures; {} where nothing says them. Raises ValueError."""
        path, count = Path(self.config.database).with_name(NAMES), len(self.database)
        if not path.is_file():
            return {}
        try:
            names = json.loads(path.read_text("utf-8"))
        except ValueError:
            names = None
        if not isinstance(names, list) or len(names) != count:
            raise ValueError(f"{path} is no list of the names of {count} pictures; make it again: stipple embed")
        return {str(name): row for row, name in enumerate(names)}

    def open(self) -> Path:
        """Read the database at once, not when it is first asked; its file. Raises as `database` and `rows` do."""
        self.database, self.rows  # noqa: B018
        return Path(self.config.database)

    @torch.no_grad()
    def forward(self, given: ConditionInputs) -> Context:
        """Embeddings of the k nearest, by cosine."""
        kept = ~given.is_dropped
        count = self.config.neighbors + self.config.query
        tokens = torch.zeros(len(kept), count, self.embedder.dim, device=kept.device)  # [B, k, d]
        if kept.any():  # of a batch in training half is dropped, and not searched for
            query = self._query(given, kept).to(tokens)  # [K, d]
            if self.database.device != query.device:
                self.database = self.database.to(query.device)
            places = nearest(query, self.database, self.config.neighbors, self._own(given, kept))
            found = self.database[places]  # [K, k] -> [K, k, d]
            tokens[kept] = torch.cat([query[:, None], found], dim=1)[:, -count:]
        return Context(tokens=tokens)

    def _own(self, given: ConditionInputs, kept: Tensor) -> Tensor | None:
        """Rows [K] of the database that are the pictures themselves, -1 where none is; None where none can be."""
        if given.names is None or not self.rows:
            return None
        named = zip(given.names, kept.tolist(), strict=True)
        return torch.tensor([self.rows.get(name, -1) for name, keep in named if keep], device=kept.device)

    def _query(self, given: ConditionInputs, kept: Tensor) -> Tensor:
        """What is searched for on behalf of those that are kept, [K, d]."""
        if given.embedding is not None:
            return given.embedding[kept]
        if given.image is not None:
            return self.embedder.images(given.image[kept])
        return self.embedder.texts([prompt for prompt, keep in zip(given.prompts, kept, strict=True) if keep])


def nearest(query: Tensor, database: Tensor, count: int, own: Tensor | None = None) -> Tensor:
    """Rows [B, count] of the points [N, d] that have the largest cosine to each of [B, d], exactly; nearest first.

    Args:
        own: a row [B] for each query that is left out for it; -1: none is.
    """
    dim, best, places = query.shape[1], None, None  # both have length sqrt(d)
    for first in range(0, len(database), ROWS):
        cosine = query @ database[first : first + ROWS].T / dim  # [B, rows]
        if own is not None:
            rows = torch.arange(first, first + cosine.shape[1], device=cosine.device)
            cosine = cosine.masked_fill(rows == own[:, None], -torch.inf)
        top, at = cosine.topk(min(count, cosine.shape[1]), dim=1)
        at = at + first
        if best is not None:
            top, at = torch.cat([best, top], dim=1), torch.cat([places, at], dim=1)
        best, order = top.topk(min(count, top.shape[1]), dim=1)
        places = at.gather(1, order)
    return places


def open_database(path: str, dim: int, count: int) -> Tensor:
    """The points [N, dim] of a file that stipple embed has written.

    Raises:
        FileNotFoundError, ValueError: it is not there, of another embedder, or has fewer than `count`.
    """
    if not path or not Path(path).is_file():
        raise FileNotFoundError(
            f"retrieval.database {path!r} does not exist; make it: stipple embed --folder FOLDER, or name "
            "another in conditioner/config.json of the model folder"
        )
    points = read_weights(path).get(EMBEDDINGS)
    if points is None or points.ndim != 2 or points.shape[1] != dim or len(points) <= count:
        found = None if points is None else tuple(points.shape)
        raise ValueError(f"database {path} has embeddings {found}; it must have more than {count} of width {dim}")
    return points.float()
