"""State dicts in files of `torch.save`, read without running the code that a pickle may contain."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Lightning's checkpoints contain objects of these modules beside the weights. Their classes are neither imported nor
# run, see `_stand_in`.
INERT = ("pytorch_lightning.", "lightning.", "numpy.", "_codecs.encode")


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the tensors whose names are `wanted`, as copies that do not depend on the file.

    Raises:
        ValueError: the file is damaged, contains something other than tensors by name, or would run code.
    """
    return {name: _copy(value) for name, value in _state_dict(_unpickle(path), path).items() if wanted(name)}


def outline(path: Path) -> dict[str, Tensor]:
    """Return names, shapes and dtypes as tensors on "meta". Raises ValueError as `read`."""
    return {name: value.to("meta") for name, value in _state_dict(_unpickle(path), path).items()}


def _copy(value: Tensor) -> Tensor:
    """Copy a tensor out of a memory-mapped file, unless it is expanded, so that the copy would be larger."""
    plain = value.layout == torch.strided and value.nbytes <= value.untyped_storage().nbytes()
    return value.clone() if plain else value


def _unpickle(path: Path) -> Any:
    """The object in a file of torch.save, made of tensors and plain containers only."""
    try:
        zipped = zipfile.is_zipfile(path)  # PyTorch before 1.6 wrote another format, which can't be memory-mapped
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        inert = [_stand_in(name) for name in foreign if name.startswith(INERT)]
        with torch.serialization.safe_globals(inert), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickle protocols; real problems raise
            return torch.load(path, "cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken or malicious pickle may raise anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} contains more than tensors, and reading it would run code ({code[1]}); if you trust the file, "
                "convert it elsewhere: safetensors.torch.save_file(torch.load(FILE, weights_only=False)"
                '["state_dict"], "FILE.safetensors")'
            ) from None
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())[:150] or type(error).__name__
        raise ValueError(f"{path} is not a readable file of torch.save ({reason}); get it again") from None


def _stand_in(name: str) -> type:
    """A class without behavior, to be unpickled in place of the class that a file names."""

    def ignore(self: object, *arguments: object, **options: object) -> None:
        """Accept any arguments and do nothing."""

    module, _, class_name = name.rpartition(".")  # torch finds the class by these
    return type(class_name, (), {"__module__": module, "__init__": ignore, "__setstate__": ignore})


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{path} does not contain a state dict (weights by name); use a file that does")
    for name, item in value.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} is not a state dict: its key {name!r} is not a string")
        if not isinstance(item, Tensor):
            raise ValueError(f"{path} is not a state dict: {name!r} is a {type(item).__name__}, not a tensor")
    return dict(value)
