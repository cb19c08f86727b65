"""Folders of training state or a model, written so that a crash at any moment leaves a complete folder.

The order is: temporary folder, files, fsync, manifest with a SHA-256 per file, fsync, rename, fsync of the parent.
Older checkpoints are removed only after that. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stipple_core.files.manifest import make_directory, problem, sync_directory, write_manifest
from stipple_core.files.training_state import load_state, open_state, save_state, whole_state

__all__ = [
    "checkpoints", "clear_temporaries", "load_state", "newest_valid", "open_state", "problem", "prune", "save_state",
    "temporary_folder", "whole_state", "write_folder",
]  # fmt: skip

TEMPORARY = ".tmp-"


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Make `folder` atomically and durably: `write` fills a temporary folder beside it, which is then renamed.

    An existing `folder` is replaced. At every moment either the old or the new folder is complete, under its own name
    or as `.tmp-old-NAME`, from which `clear_temporaries` restores it.

    Args:
        folder: the folder to make.
        write: writes the files into the folder that it is called with. It may return the SHA-256 by name of files that
            other processes have already made durable (see `manifest.durable_sha256`).
    """
    folder = Path(folder)
    make_directory(folder.parent)
    temporary = temporary_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    aside = folder.parent / f"{TEMPORARY}old-{folder.name}"
    try:
        durable = write(temporary)
        write_manifest(temporary, durable if isinstance(durable, dict) else None)
        if folder.exists():
            _remove(aside)
            os.rename(folder, aside)
        os.rename(temporary, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(folder.parent)
    _remove(aside)


def temporary_folder(folder: Path) -> Path:
    """The temporary folder in which `write_folder` prepares `folder`."""
    return folder.parent / f"{TEMPORARY}{folder.name}"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints `step-NNNNNNN` in a folder, oldest first, valid or not."""
    return sorted(path for path in Path(folder).glob("step-*") if path.is_dir())


def newest_valid(folder: Path, sums: bool = True) -> Path | None:
    """Return the newest checkpoint that agrees with its manifest; print each newer one that does not to stderr.

    Args:
        folder: contains the checkpoints.
        sums: compare SHA-256 sums; otherwise only sizes, as in `manifest.problem`.
    """
    for path in reversed(checkpoints(folder)):
        wrong = problem(path, sums)
        if wrong is None:
            return path
        print(f"checkpoint {path} is not used: {wrong}", file=sys.stderr)
    return None


def clear_temporaries(folder: Path) -> None:
    """Remove leftovers of an interrupted `write_folder`, and restore a complete folder that was moved aside."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        name = path.name.removeprefix(f"{TEMPORARY}old-")
        if name != path.name and not (path.parent / name).exists():
            os.rename(path, path.parent / name)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder, file or symbolic link as far as possible, ignoring errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` (at least 2) valid checkpoints and remove all older ones.

    A checkpoint counts as valid by its file sizes, except for the second newest valid one, which is read in full and
    compared with its SHA-256 sums: two verified checkpoints remain, because the newest was read back when it was
    written. Nothing is removed before that.
    """
    newest_first, kept = checkpoints(folder)[::-1], 0
    if len(newest_first) <= max(keep, 2):
        return
    for path in newest_first:
        if kept >= max(keep, 2) and not path.is_symlink():
            shutil.rmtree(path)
        elif problem(path, sums=kept == 1) is None:
            kept += 1
