"""The manifest of a folder: a SHA-256 and a size for each of its files, by which damage of any kind is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Make all files of a folder durable, write their manifest, then make that and the folders durable.

    `known` are the sums, by name, of files that other processes made durable themselves (see `durable_sum`).

    Raises:
        OSError: a file of another process is not to be seen here.
    """
    known = known or {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    if unseen := sorted(known.keys() - names.keys()):
        told = "written by another process, not to be seen by the first one; put the run on a disk that all share"
        raise OSError(errno.ENOENT, told, str(folder / unseen[0]))
    sums = {name: known.get(name) or durable_sum(path) for name, path in names.items()}
    sizes = {name: path.stat().st_size for name, path in names.items()}
    (folder / MANIFEST).write_text(_text({"sha256": sums, "bytes": sizes}))
    durable_sum(folder / MANIFEST)
    for inner in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_directory(inner)


def problem(folder: Path, sums: bool = True) -> str | None:
    """What is wrong with a folder of which `write_manifest` was the last to write; None when nothing is.

    Its files, hidden ones aside, are those of the manifest, with their sums and sizes; none is a symbolic link, which
    could lead elsewhere; and the manifest itself is to the last byte what would be written today. With `sums` false
    only sizes are compared, which reads no file: for folders that were verified when written.
    """
    folder = Path(folder)
    if folder.is_symlink():
        return "it is a symbolic link"
    try:
        manifest = _read(folder / MANIFEST)
        found = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
        for name, path in found.items():
            if path.is_symlink() or not path.is_file():
                return f"{name} is a symbolic link, or no file"
            if name not in manifest["sha256"] and name != MANIFEST and not path.name.startswith("."):
                return f"{name} is not in its {MANIFEST}"
        for name, expected in manifest["sha256"].items():
            if name not in found:
                return f"{name} is missing"
            if (size := found[name].stat().st_size) != manifest["bytes"][name]:
                return f"{name} has {size} bytes, not {manifest['bytes'][name]}"
            if sums and _sha256(found[name]) != expected:
                return f"{name} is damaged (SHA-256 differs from the manifest's)"
    except OSError as error:
        return f"{error.filename or MANIFEST} can't be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


def durable_sum(path: Path) -> str:
    """The SHA-256 of a file that is on the disk when it is taken."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_directory(path: Path) -> list[Path]:
    """Make a directory and those above it, and their names durable; returns the new ones, the innermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)
    return missing


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest; ValueError unless it is what `write_manifest` writes, so that no bit of it may be another."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"there is no {MANIFEST}")
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        whole = _text(manifest) == text and manifest["sha256"].keys() == manifest["bytes"].keys()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"its {MANIFEST} is damaged")
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
