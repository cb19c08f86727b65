"""All readers, and their files in a model folder.

conditioner/config.json          {name of the reader: its config}
conditioner/model.safetensors    NAME.WEIGHT for readers that have weights

To add a reader:

1. Write a module with a config dataclass and a subclass of `conditioning.interface.input_reader.InputReader`.
2. Add a row to `READERS`.
3. Add a field of the same name to `conditioning.conditioners.ConditionerConfig`.
4. If it reads a new kind of input: add a field to `conditioning.interface.inputs.ConditionInputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from conditioning.interface.input_reader import InputReader, Reader
from conditioning.readers.combined import FOLDER, WEIGHTS
from conditioning.readers.frame import FrameReader
from conditioning.readers.image_embedding import ImageEmbeddingReader
from conditioning.readers.retrieval import RetrievalReader
from conditioning.readers.spatial import SpatialReader
from conditioning.readers.text_embedding import TextEmbeddingReader
from stipple_core.files.json_file import read_json
from stipple_core.files.weights import place, read_weights

READERS: dict[str, type[InputReader]] = {  # by section of ConditionerConfig; the order is that of vectors and latents
    "spatial": SpatialReader,
    "frame": FrameReader,
    "image": ImageEmbeddingReader,
    "text": TextEmbeddingReader,
    "retrieval": RetrievalReader,
}


def build_readers(sections: Any, seed: int) -> dict[str, Reader]:
    """Return new readers for the sections of a `ConditionerConfig` that are not None, in the order of READERS.

    Args:
        seed: Seed of the weights.
    """
    built = {}
    for name, kind in READERS.items():
        if getattr(sections, name) is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                built[name] = kind(getattr(sections, name))
            built[name].requires_grad_(built[name].trainable)
    return built


def load_readers(model_folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Reader]:
    """Load the readers of a model folder, {} if it has none; dtype None is float32.

    Raises:
        FileNotFoundError, ValueError: In one line, if files are missing or do not fit.
    """
    folder = Path(model_folder) / FOLDER
    if not folder.is_dir():
        return {}
    configs = read_json(folder / "config.json", f"no config.json in {folder}; it configures the readers of the model")
    weights = read_weights(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    readers = {}
    if unknown := sorted(configs.keys() - READERS.keys()):
        raise ValueError(f"{folder} has an unknown reader {unknown[0]!r}; it must be one of {', '.join(READERS)}")
    for name in (name for name in READERS if name in configs):
        with torch.device("meta"):
            reader = READERS[name](_config(READERS[name].Config, configs[name], f"{folder / 'config.json'}: {name}"))
        part = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
        part = {key: w.to(dtype or torch.float32) if w.is_floating_point() else w for key, w in part.items()}
        place(reader, part, folder)
        readers[name] = reader.requires_grad_(reader.trainable)
    return readers


def _config(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Return a config dataclass, with nested ones, of plain values."""
    nested = {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}
    try:
        inner = {name: _config(kind, values[name], where) for name, kind in nested.items() if name in values}
        return cls(**{**values, **inner})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not describe a reader: {error}") from None
