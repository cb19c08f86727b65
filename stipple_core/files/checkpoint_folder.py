"""Folders of training state (`stipple_core.files.training_state`) or a model, written so that a crash at any moment leaves a whole one.

The order is: temporary folder, files, fsync, manifest with a SHA-256 per file, fsync, rename, fsync of the parent;
older checkpoints are removed only after that. Nothing is pickled, so nothing is ever unpickled.
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
    """Make `folder` in one step: `write` fills a temporary folder beside it, which is made durable, then renamed.

    An existing `folder` is replaced; there is no moment at which neither is complete under its name or the aside name.
    `write` may return the sums, by name, of files that other processes made durable (see `manifest.durable_sum`).
    """
    folder = Path(folder)
    make_directory(folder.parent)
    temporary = temporary_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    aside = folder.parent / f"{TEMPORARY}old-{folder.name}"
    try:
        known = write(temporary)
        write_manifest(temporary, known if isinstance(known, dict) else None)
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
    """Where `write_folder` fills a folder."""
    return folder.parent / f"{TEMPORARY}{folder.name}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints `step-NNNNNNN` in a folder, oldest first, good or not."""
    return sorted(path for path in Path(folder).glob("step-*") if path.is_dir())


def newest_valid(folder: Path, sums: bool = True) -> Path | None:
    """The newest checkpoint whose manifest holds; each newer one that does not is named on stderr.

    With `sums` false only sizes are compared, as by `manifest.problem`.
    """
    for path in reversed(checkpoints(folder)):
        wrong = problem(path, sums)
        if wrong is None:
            return path
        print(f"checkpoint {path} is not used: {wrong}", file=sys.stderr)
    return None


def clear_temporaries(folder: Path) -> None:
    """Remove what an interrupted `write_folder` left behind; a complete folder that was moved aside is put back."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        name = path.name.removeprefix(f"{TEMPORARY}old-")
        if name != path.name and not (path.parent / name).exists():
            os.rename(path, path.parent / name)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove what was put aside as far as possible: a folder, or the file or symbolic link that was in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` (at least 2) valid checkpoints, and the broken ones older than them.

    Before anything is removed, two are verified: the newest was read back when it was written, of which only sizes are
    compared, and another one is read in full here. What is kept besides is judged by its sizes.
    """
    newest_first, kept = checkpoints(folder)[::-1], 0
    if len(newest_first) <= max(keep, 2):
        return
    for path in newest_first:
        if kept >= max(keep, 2) and not path.is_symlink():
            shutil.rmtree(path)
        elif problem(path, sums=kept == 1) is None:
            kept += 1
