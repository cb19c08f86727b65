"""Safetensors files, read and written with checks that the library does not make.

The library checks offsets and dtypes. It needs minutes for a header of millions of empty tensors, silently uses the
last of two tensors of one name, and reports a full disk by its own exception. This module handles these cases.
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

READ_ERRORS = (SafetensorError, OSError, KeyError, RuntimeError, ValueError)  # raised while a damaged file is read
MAX_HEADER = 1 << 23  # bytes; the header of 10,000 weights has about 1 MB
MAPPED_TOGETHER = 1 << 25  # bytes of a file that are memory-mapped at a time; the last tensor may exceed it


def outline(path: Path) -> dict[str, Tensor]:
    """Return names, shapes and dtypes as tensors on "meta". Raises ValueError for a damaged file."""
    with readable(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # maps the file but reads no weight


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header. Raises ValueError for a damaged file."""
    with readable(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the tensors whose names are `wanted`.

    Raises:
        ValueError: the file is damaged, or was replaced while it was read.
    """
    before = _identity(path)
    try:
        with readable(path):
            weights = _copies(path, wanted)
    except ValueError:
        if _identity(path) == before:
            raise
    if _identity(path) != before:  # takes precedence over any other error
        raise ValueError(f"{path} was replaced while it was read; try again")
    return weights


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file with the permissions of the umask. Raises OSError if the disk fails or is full."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
        if metadata:
            _sort_metadata(path)
        os.chmod(path, _plain_mode())  # the library makes files that only their owner can read
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which the library writes in random order, so that equal files have equal bytes."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the library pads the header with blanks
            file.seek(8)
            file.write(text.ljust(size))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Check the header of a file, and turn any error inside the block into a ValueError of one line."""
    try:
        size, twice = _header(path)
        if size > MAX_HEADER:
            raise ValueError(f"a header of {size} bytes, weight files have at most {MAX_HEADER}")
        if twice:
            raise ValueError(f"it names {', '.join(map(repr, twice[:5]))} twice")
        yield
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"{path} is not a readable safetensors file ({reason}); get it again") from None


def _plain_mode() -> int:
    """The permissions that `open` gives to a new file."""
    umask = os.umask(0o077)  # reading the umask requires setting it; this value is safe for the moment
    os.umask(umask)
    return 0o666 & ~umask


def _header(path: Path) -> tuple[int, list[str]]:
    """Return the size of the header in bytes and the names that occur twice in it."""
    twice: list[str] = []

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice.extend(name for name in values if names.count(name) > 1)
        return values

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size <= MAX_HEADER:
            try:
                json.loads(file.read(size), object_pairs_hook=once)
            except (ValueError, RecursionError):
                pass  # the library reports this with a better message
    return size, twice


def _copies(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Copy tensors out of a memory-mapped file; it is mapped anew every few tensors to free its pages."""
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
    """Numbers that change when a file is replaced or rewritten; None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
