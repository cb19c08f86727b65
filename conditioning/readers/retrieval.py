"""Conditioning on similar images (Blattmann et al. 2022, arXiv:2204.11824): embeddings of nearest neighbors.

Training retrieves the neighbors of the training image, sampling those of a prompt or of an image. So the model can look
up what it need not memorize. If the database contains the training images, an image is excluded from its own neighbors;
the database identifies it by its file name.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from conditioning.interface.context import Context
from conditioning.interface.input_reader import InputReader, Widths
from conditioning.interface.inputs import ConditionInputs
from stipple_core.embedders import EmbedderConfig, build_embedder
from stipple_core.files.weights import read_weights

ROWS = 1 << 18  # rows of the database per matrix product: 1 GiB of float32 scores for 1,000 queries
EMBEDDINGS = "embeddings"  # name of the tensor in a database
NAMES = "names.json"  # beside the database: file names of its images, in order


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Which database neighbors are retrieved from, and how many.

    Raises:
        ValueError: There are no neighbors.
    """

    encoder: EmbedderConfig = field(default_factory=EmbedderConfig)  # network that embedded the database
    database: str = ""  # file that stipple embed wrote
    neighbors: int = 4  # number k of tokens, nearest first
    query: bool = False  # add one token, the first: the embedding of the query

    def __post_init__(self):
        if self.neighbors < 1:
            raise ValueError(f"retrieval.neighbors {self.neighbors} must be at least 1; Blattmann et al. use 4")


class RetrievalReader(InputReader):
    """ConditionInputs.image, or prompts if there is no image -> Context with tokens [B, k, d], embeddings of neighbors.

    Dropped members have zeros. The database is not a part of the model folder, whose config stores its path, and can be
    replaced.
    """

    reads = optional = frozenset({"image"})
    reads_prompts = True
    Config = RetrievalConfig

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.embedder = build_embedder(config.encoder)
        path = config.database and os.path.abspath(config.database)  # the working directory may change
        self.config = replace(config, encoder=self.embedder.config, database=path)
        self.widths = Widths(tokens=self.embedder.dim)

    @cached_property
    def database(self) -> Tensor:
        """Embeddings [N, d]. Raises FileNotFoundError or ValueError, in one line."""
        return open_database(self.config.database, self.embedder.dim, self.config.neighbors)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Rows of the database by file name; {} if there is no list of names. Raises ValueError."""
        path, count = Path(self.config.database).with_name(NAMES), len(self.database)
        if not path.is_file():
            return {}
        try:
            names = json.loads(path.read_text("utf-8"))
        except ValueError:
            names = None
        if not isinstance(names, list) or len(names) != count:
            raise ValueError(f"{path} is not a list of the names of {count} images; make it again with stipple embed")
        return {str(name): row for row, name in enumerate(names)}

    def open_files(self) -> list[Path]:
        """Open the database and return its path. Raises FileNotFoundError or ValueError, in one line."""
        self.database, self.rows  # noqa: B018
        return [Path(self.config.database)]

    @torch.no_grad()
    def forward(self, inputs: ConditionInputs) -> Context:
        """Return the embeddings of the k nearest neighbors by cosine similarity."""
        shown = ~inputs.is_dropped
        count = self.config.neighbors + self.config.query
        tokens = torch.zeros(len(shown), count, self.embedder.dim, device=shown.device)  # [B, k, d]
        if shown.any():  # skips the dropped half of a training batch
            query = self._query(inputs, shown).to(tokens)  # [K, d]
            if self.database.device != query.device:
                self.database = self.database.to(query.device)
            rows = nearest(query, self.database, self.config.neighbors, self._own_rows(inputs, shown))
            neighbors = self.database[rows]  # [K, k] -> [K, k, d]
            tokens[shown] = torch.cat([query[:, None], neighbors], dim=1)[:, -count:]
        return Context(tokens=tokens)

    def _own_rows(self, inputs: ConditionInputs, shown: Tensor) -> Tensor | None:
        """Return rows [K] of the database that are the images themselves, -1 for none; None if there are no names."""
        if inputs.names is None or not self.rows:
            return None
        named = zip(inputs.names, shown.tolist(), strict=True)
        return torch.tensor([self.rows.get(name, -1) for name, is_shown in named if is_shown], device=shown.device)

    def _query(self, inputs: ConditionInputs, shown: Tensor) -> Tensor:
        """Return the embeddings [K, d] to search for."""
        if inputs.embedding is not None:
            return inputs.embedding[shown]
        if inputs.image is not None:
            return self.embedder.images(inputs.image[shown])
        named = zip(inputs.prompts, shown, strict=True)
        return self.embedder.texts([prompt for prompt, is_shown in named if is_shown])


def nearest(query: Tensor, database: Tensor, count: int, own: Tensor | None = None) -> Tensor:
    """Return the rows [B, count] of the database [N, d] with the largest cosine to each query [B, d], nearest first.

    The search is exact. All vectors must have length sqrt(d).

    Args:
        own: Row [B] to exclude for each query; -1 for none.
    """
    dim, best, rows = query.shape[1], None, None
    for first in range(0, len(database), ROWS):
        cosine = query @ database[first : first + ROWS].T / dim  # [B, rows]
        if own is not None:
            part = torch.arange(first, first + cosine.shape[1], device=cosine.device)
            cosine = cosine.masked_fill(part == own[:, None], -torch.inf)
        top, at = cosine.topk(min(count, cosine.shape[1]), dim=1)
        at = at + first
        if best is not None:
            top, at = torch.cat([best, top], dim=1), torch.cat([rows, at], dim=1)
        best, order = top.topk(min(count, top.shape[1]), dim=1)
        rows = at.gather(1, order)
    return rows


def open_database(path: str, dim: int, count: int) -> Tensor:
    """Read the embeddings [N, dim] in a file that stipple embed wrote.

    Raises:
        FileNotFoundError, ValueError: The file does not exist, is of another embedder, or has at most `count` rows.
    """
    if not path or not Path(path).is_file():
        raise FileNotFoundError(
            f"retrieval.database {path!r} does not exist; make it with stipple embed --folder FOLDER, or change the "
            "path in conditioner/config.json of the model folder"
        )
    points = read_weights(path).get(EMBEDDINGS)
    if points is None or points.ndim != 2 or points.shape[1] != dim or len(points) <= count:
        shape = None if points is None else tuple(points.shape)
        raise ValueError(f"database {path} has embeddings {shape}; it must have more than {count} of width {dim}")
    return points.float()
