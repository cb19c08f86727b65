"""The kinds of readers, and how they lie in a model folder.

conditioner/config.json          {name: its config}
conditioner/model.safetensors    NAME.WEIGHT of those that have weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conditioning.readers.frame import FrameReader
from conditioning.readers.image_embedding import ImageEmbeddingReader
from conditioning.readers.retrieval import RetrievalReader
from conditioning.readers.spatial import SpatialReader
from conditioning.readers.text_embedding import TextEmbeddingReader
from stipple_core.files.json_file import read_json, write_json
from stipple_core.files.weights import place, read_weights, write_weights

FOLDER, WEIGHTS = "conditioner", "model.safetensors"
# section of ConditionerConfig: the class of the reader; `Reader.Config` is that of its config
READERS: dict[str, type[nn.Module]] = {
    "spatial": SpatialReader,
    "frame": FrameReader,
    "image": ImageEmbeddingReader,
    "text": TextEmbeddingReader,
    "retrieval": RetrievalReader,
}


def build_readers(sections: Any, seed: int) -> dict[str, nn.Module]:
    """New readers of the sections that are not None, in the order of READERS; weights are drawn from the seed."""
    built = {}
    for name, kind in READERS.items():
        if getattr(sections, name) is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                built[name] = kind(getattr(sections, name))
            built[name].requires_grad_(built[name].trainable)
    return built


def save_readers(readers: Mapping[str, nn.Module], model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write conditioner/ into a model folder; dtype None keeps the weights' own."""
    folder = Path(model_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{name}.{key}": weight.to(dtype if weight.is_floating_point() else None)
        for name, reader in readers.items()
        for key, weight in reader.state_dict().items()
    }
    if weights:
        write_weights(weights, folder / WEIGHTS)
    write_json({name: asdict(reader.config) for name, reader in readers.items()}, folder / "config.json")


def load_readers(model_folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """The readers of a model folder, {} where it has none; dtype None is float32.

    Raises:
        ValueError: in one line naming the folder and what is wrong in it.
    """
    folder = Path(model_folder) / FOLDER
    if not folder.is_dir():
        return {}
    configs = read_json(folder / "config.json", f"no config.json in {folder}; it names what the model reads")
    weights = read_weights(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
    readers = {}
    if unknown := sorted(configs.keys() - READERS.keys()):
        raise ValueError(f"{folder} has a reader {unknown[0]!r}, which is unknown; there are {', '.join(READERS)}")
    for name in (name for name in READERS if name in configs):  # in their order, which that of vectors and latents is
        values = configs[name]
        with torch.device("meta"):
            reader = READERS[name](_config(READERS[name].Config, values, f"{folder / 'config.json'}: {name}"))
        own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
        own = {key: w.to(dtype or torch.float32) if w.is_floating_point() else w for key, w in own.items()}
        place(reader, own, folder)
        readers[name] = reader.requires_grad_(reader.trainable)
    return readers


def _config(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A config dataclass of plain values, nested ones too."""
    nested = {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}
    try:
        inner = {name: _config(kind, values[name], where) for name, kind in nested.items() if name in values}
        return cls(**{**values, **inner})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} describes no reader: {error}") from None
