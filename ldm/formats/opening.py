"""Opening a stored model of any supported kind: a model folder, or a single file in CompVis' names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ldm.formats.model_folder import open_model_folder
from ldm.formats.model_parts import ModelParts
from ldm.formats.single_file import open_single_file


def open_model(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    config_yaml: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction: str | None = None,
) -> ModelParts:
    """Open a model folder or a single file on the CPU, in evaluation mode.

    Args:
        path: a folder with model_index.json, or a .ckpt or .safetensors file.
        dtype: of the weights in memory, whatever the files hold.
        variant: of a folder: which weights, such as "fp16"; see `stipple_core.files.weights.read_folder`.
        config_yaml, tokenizer, prediction: of a file: see `ldm.formats.single_file.open_single_file`.

    Raises:
        FileNotFoundError: the path or a file in the folder does not exist.
        ValueError: the model is not supported or does not fit together, or an option belongs to the other kind of
            source.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; give a model folder, or a .ckpt or .safetensors file")
    of_file = {"config_yaml": config_yaml, "tokenizer": tokenizer, "prediction": prediction}
    if Path(path).is_file():
        _refuse(f"{path} is a single file", "a model folder", variant=variant)
        return open_single_file(path, config_yaml, tokenizer, prediction, dtype)
    _refuse(f"{path} is a model folder", "a single file", **of_file)
    return open_model_folder(path, dtype, variant)


def _refuse(source: str, other_kind: str, **options: Any) -> None:
    """Raise ValueError if an option of the other kind of source is specified."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{source}, and {name} is an option of {other_kind}; leave it out")
