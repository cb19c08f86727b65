"""Safetensors files of strangers and our own: headers are looked at before they are believed, tensors copied out whole.

The library checks offsets and types. It takes minutes over a header of millions of empty tensors, takes the last of
two tensors of one name, and calls a full disk by an exception of its own; those are dealt with here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DAMAGES = (SafetensorError, OSError, KeyError, RuntimeError, ValueError)  # what reading a bad file raises
MAX_HEADER = 1 << 23  # bytes; 10,000 weights have about 1 MB
MAPPED_TOGETHER = 1 << 25  # bytes of a file that are mapped into memory at a time, but for the last tensor


def outline(path: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes: tensors on "meta". Raises ValueError for a damaged file."""
    with readable(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # maps, but reads no weight


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header. Raises ValueError for a damaged file."""
    with readable(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors; ValueError for a file that is damaged, or that does not stay the same meanwhile."""
    before = _identity(path)
    try:
        with readable(path):
            weights = _copies(path, wanted)
    except ValueError:
        if _identity(path) == before:
            raise
    if _identity(path) != before:  # whatever else went wrong
        raise ValueError(f"{path} was replaced while it was read; try again")
    return weights


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, readable to whom the umask lets. Raises OSError where the disk fails, also if it is full."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
        if metadata:
            _sort_metadata(path)
        os.chmod(path, _plain_mode())  # the library makes its files readable to their owner alone
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order, which the library writes at random: equal files are to have equal bytes."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as the library writes it, but for blanks at its end
            file.seek(8)
            file.write(text.ljust(size))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within the block, what is wrong with a file is a ValueError in one line; its header is looked at before."""
    try:
        size, twice = _header(path)
        if size > MAX_HEADER:
            raise ValueError(f"a header of {size} bytes, weight files have at most {MAX_HEADER}")
        if twice:
            raise ValueError(f"it names {', '.join(map(repr, twice[:5]))} twice")
        yield
    except DAMAGES as error:
        told = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"{path} is not a readable safetensors file ({told}); get it again") from None


def _plain_mode() -> int:
    """The permissions of a file that `open` makes."""
    umask = os.umask(0o077)  # it can't be read without being set: for a moment, to what shows nobody anything
    os.umask(umask)
    return 0o666 & ~umask


def _header(path: Path) -> tuple[int, list[str]]:
    """How many bytes the header has, and the names that occur twice in it; a header that is none has no names."""
    twice: list[str] = []

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice.extend(name for name in found if names.count(name) > 1)
        return found

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size <= MAX_HEADER:
            try:
                json.loads(file.read(size), object_pairs_hook=once)
            except (ValueError, RecursionError):
                pass  # which the library refuses in better words
    return size, twice


def _copies(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a file, copied out of its mapping, which is given up every few of them: it fills memory, too."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if wanted(name)]
    weights: dict[str, Tensor] = {}
    while len(weights) < len(names):
        with safe_open(path, framework="pt") as file:
            mapped = 0
            while len(weights) < len(names) and mapped < MAPPED_TOGETHER:
                name = names[len(weights)]
                weights[name] = file.get_tensor(name).clone()
                mapped += weights[name].nbytes
    return weights


def _identity(path: Path) -> tuple[int, ...] | None:
    """Numbers that differ when a file was written anew; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
