"""What is put on a model that is opened to draw: low-rank additions to its weights, and words that it has learned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple_core.images.drawn_pictures import model_hash

if TYPE_CHECKING:  # torch takes seconds to import: --help answers at once
    from ldm.pipeline import TextToImage


def add(
    model: TextToImage,
    loras: Sequence[str] | None,
    embeddings: Sequence[str] | None,
    record: Mapping[str, Any],
    like: str | None,
) -> dict[str, list[str]]:
    """Put them on a model, in order; what there is to record of it.

    Args:
        model: changed in place.
        loras: PATH or PATH:WEIGHT each; None: those of the record.
        embeddings: a path each; None: those of the record.
        record: of the picture that is to be made again, or {}.
        like: the file of that picture.

    Raises:
        FileNotFoundError, ValueError: in one line, for what is not there, or was made for another model.
    """
    given = {"lora": loras, "embedding": embeddings}
    about: dict[str, list[str]] = {}
    for kind, put in (("lora", _put_lora), ("embedding", _put_embedding)):
        wanted = _texts(record, kind, like) if given[kind] is None else given[kind]
        if not wanted:
            continue
        about[kind], name = list(wanted), f"{kind}_hash"
        about[name] = [model_hash(put(model, each)) for each in wanted]
        if given[kind] is None and (was := _texts(record, name, like)) != about[name]:
            told = f"{', '.join(was)}, this is {', '.join(about[name])}"
            warnings.warn(f"{like} was made with {kind} {told}: it will differ", stacklevel=1)
    return about


def parse_lora(text: str) -> tuple[str, float]:
    """PATH:WEIGHT, or PATH, whose weight is 1. Raises ValueError for a weight that is no finite number."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        if number and not Path(path).exists():
            return text, 1.0  # a path with a colon in it, which is not there
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"--lora {text!r} has the weight {number!r}; use a finite number, 1 is as trained")
    return path, weight


def _put_lora(model: TextToImage, text: str) -> Path:
    """Merge one into a model; the file that it was read from."""
    from ldm.formats.lora import merge, read_lora

    path, weight = parse_lora(text)
    lora = read_lora(path)
    merge(lora, weight, model.unet, getattr(model.conditioner.prompts, "encoder", None))
    return Path(lora.source)


def _put_embedding(model: TextToImage, path: str) -> Path:
    """Teach a model a word; the file that it was read from."""
    from conditioning.text.new_tokens import FILE, new_token, read_embedding

    new_token(model.conditioner.prompts, *read_embedding(path)).requires_grad_(False)
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _texts(record: Mapping[str, Any], name: str, like: str | None) -> list[str]:
    """A list of texts in a record, [] where there is none. Raises ValueError for anything else."""
    value = record.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"the record in {like} has a {name} that is no list of texts; give --{name.split('_')[0]}")
    return value
