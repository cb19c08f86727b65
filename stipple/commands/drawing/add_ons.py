"""Additions to an opened model: LoRAs, and words learned by textual inversion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple_core.images.drawn_pictures import model_hash

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    from ldm.pipeline import TextToImage


def add_to_model(
    model: TextToImage,
    loras: Sequence[str] | None,
    embeddings: Sequence[str] | None,
    record: Mapping[str, Any],
    like: str | None,
) -> dict[str, list[str]]:
    """Add LoRAs and learned words to a model, and return what to record of them.

    Args:
        model: is changed in place.
        loras: PATH or PATH:WEIGHT for each; None: those in the record.
        embeddings: a path for each; None: those in the record.
        record: of the picture that is drawn again, or {}.
        like: the file of that picture.

    Raises:
        FileNotFoundError, ValueError: for a file that does not exist, or was made for another model.
    """
    specified = {"lora": loras, "embedding": embeddings}
    recorded: dict[str, list[str]] = {}
    for kind, add in (("lora", _add_lora), ("embedding", _add_embedding)):
        sources = _texts(record, kind, like) if specified[kind] is None else specified[kind]
        if not sources:
            continue
        hash_name = f"{kind}_hash"
        hashes = [model_hash(add(model, source)) for source in sources]
        recorded |= {kind: list(sources), hash_name: hashes}
        if specified[kind] is None and (before := _texts(record, hash_name, like)) != hashes:
            warnings.warn(
                f"{like} was made with {kind} {', '.join(before)}, this is {', '.join(hashes)}: it will differ",
                stacklevel=1,
            )
    return recorded


def parse_lora(text: str) -> tuple[str, float]:
    """Return path and weight of PATH:WEIGHT, or of PATH, whose weight is 1.

    Raises:
        ValueError: the weight is not a finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        if number and not Path(path).exists():
            return text, 1.0  # a path with a colon in it that does not exist
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"--lora {text!r} has the weight {number!r}; use a finite number, 1 is as trained")
    return path, weight


def _add_lora(model: TextToImage, text: str) -> Path:
    """Merge a LoRA into a model; return the file that it was read from."""
    from ldm.formats.lora import merge, read_lora

    path, weight = parse_lora(text)
    lora = read_lora(path)
    merge(lora, weight, model.unet, getattr(model.conditioner.prompts, "encoder", None))
    return Path(lora.source)


def _add_embedding(model: TextToImage, path: str) -> Path:
    """Add a learned word to a model; return the file that it was read from."""
    from conditioning.text.new_tokens import FILE, new_token, read_embedding

    new_token(model.conditioner.prompts, *read_embedding(path)).requires_grad_(False)
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _texts(record: Mapping[str, Any], name: str, like: str | None) -> list[str]:
    """Return a list of texts in a record, [] if there is none. Raises ValueError for anything else."""
    value = record.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        flag = f"--{name.split('_')[0]}"
        raise ValueError(f"the record in {like} has a {name} that is not a list of texts; give {flag}")
    return value
