"""The manifest of a folder: SHA-256 and size of each file, which reveal damaged, missing and additional files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stipple_core.files.hashing import file_sha256

MANIFEST = "manifest.json"


def write_manifest(folder: Path, durable: Mapping[str, str] | None = None) -> None:
    """Make all files of a folder durable, write their manifest, then make the manifest and the folders durable.

    Args:
        folder: the folder.
        durable: SHA-256 by name of files that other processes have already made durable (see `durable_sha256`).

    Raises:
        OSError: a file in `durable` is not visible to this process.
    """
    durable = durable or {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    if unseen := sorted(durable.keys() - names.keys()):
        reason = "written by another process and not visible to the first one; put the run on a shared disk"
        raise OSError(errno.ENOENT, reason, str(folder / unseen[0]))
    sums = {name: durable.get(name) or durable_sha256(path) for name, path in names.items()}
    sizes = {name: path.stat().st_size for name, path in names.items()}
    (folder / MANIFEST).write_text(_text({"sha256": sums, "bytes": sizes}))
    durable_sha256(folder / MANIFEST)
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_directory(inner)


def problem(folder: Path, sums: bool = True) -> str | None:
    """Compare a folder with its manifest; return a description of the first difference, or None.

    The folder must contain exactly the files of the manifest (hidden files are ignored) with the same sizes and sums.
    Symbolic links are a difference. The manifest itself must be, byte by byte, what `write_manifest` writes.

    Args:
        folder: the folder.
        sums: compare SHA-256 sums. False compares sizes only, which reads no file.
    """
    folder = Path(folder)
    if folder.is_symlink():
        return "it is a symbolic link"
    try:
        manifest = _read(folder / MANIFEST)
        files = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
        for name, path in files.items():
            if path.is_symlink() or not path.is_file():
                return f"{name} is a symbolic link or not a regular file"
            if name not in manifest["sha256"] and name != MANIFEST and not path.name.startswith("."):
                return f"{name} is not in its {MANIFEST}"
        for name, expected in manifest["sha256"].items():
            if name not in files:
                return f"{name} is missing"
            if (size := files[name].stat().st_size) != manifest["bytes"][name]:
                return f"{name} has {size} bytes, not {manifest['bytes'][name]}"
            if sums and file_sha256(files[name]) != expected:
                return f"{name} is damaged (SHA-256 differs from the manifest's)"
    except OSError as error:
        return f"{error.filename or MANIFEST} can't be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


def durable_sha256(path: Path) -> str:
    """Flush a file to disk, then return its SHA-256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


def make_directory(path: Path) -> list[Path]:
    """Make a directory and its parents durably; return those that did not exist, the innermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)
    return missing


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Read the manifest. Raises ValueError unless it is byte by byte what `write_manifest` writes."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"it has no {MANIFEST}")
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        valid = _text(manifest) == text and manifest["sha256"].keys() == manifest["bytes"].keys()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"its {MANIFEST} is damaged")
    return manifest
