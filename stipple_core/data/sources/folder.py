"""Pictures of a folder: Hugging Face image folders, sidecar .txt captions, nested folders.

A caption comes from a row of a metadata.jsonl or metadata.csv at any level (its `file_name` is relative to the folder
that it lies in), or from NAME.txt beside NAME.png (column "text"; several lines are several captions). What can't be
used is skipped with a reason.

Scanning costs one `os.scandir` per folder and no look into any picture: that a picture is there and not empty comes
from the folder's listing. Damaged pictures are met when they are decoded (`storage.dataset`). Only `min_size` above 1
reads headers.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from stipple_core.data.records.records import Skip
from stipple_core.data.records.rows import SourceImage
from stipple_core.data.sources.metadata import METADATA, read_rows, read_sidecar

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def images_in_folder(root: str, files: Mapping[str, int], captioned: bool) -> Iterator[SourceImage | Skip]:
    """The pictures of an absolute folder in order of names, after what can't be used; `files` as `walk` lists them."""
    rows, skipped = _gather_rows(root, files)
    if not captioned:
        rows |= {name: {} for name in files if is_image_name(name) and name not in rows}
        skipped = [skip for skip in skipped if skip.path not in rows and not skip.path.endswith(".txt")]
    yield from skipped
    for name in sorted(rows):
        yield SourceImage(os.path.join(root, name), name, rows.pop(name), files[name])


def walk(root: str, folder: str) -> Iterator[tuple[str, int]]:
    """Names relative to `root` and sizes of all files that are not hidden; -1 marks a directory named like an image."""
    with os.scandir(os.path.join(root, folder)) as entries:
        listing = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in listing:
        name = posixpath.join(folder, entry.name)
        try:
            if entry.is_dir():
                if is_image_name(name):
                    yield name, -1
                elif not entry.is_symlink():  # a linked folder could hold its own parent
                    yield from walk(root, name)
            else:
                yield name, entry.stat().st_size
        except OSError:
            yield name, 0  # a broken link, or no permission: as good as empty


def is_image_name(name: str) -> bool:
    """Whether the name ends like that of a picture."""
    return name.lower().endswith(EXTENSIONS)


def _gather_rows(root: str, files: Mapping[str, int]) -> tuple[dict[str, dict[str, Any]], list[Skip]]:
    """Rows by file name, from metadata files first, then sidecars; and what can't be used of them."""
    rows: dict[str, dict[str, Any]] = {}
    skipped: list[Skip] = []
    found = (name for name in files if posixpath.basename(name) in METADATA)
    for metadata in sorted(found, key=lambda name: -name.count("/")):  # the nearest to a picture describes it
        for line, row in read_rows(os.path.join(root, metadata)):
            place = f"{metadata}:{line}"
            name = _resolve(place, posixpath.dirname(metadata), row)
            reason = row if isinstance(row, str) else _refusal(name, files, rows)
            if reason:
                skipped.append(Skip(place, reason))
            else:
                rows[name] = row
    for name in filter(is_image_name, files):
        sidecar = f"{posixpath.splitext(name)[0]}.txt"
        if sidecar in files and not rows.get(name, {}).get("text"):
            text = read_sidecar(os.path.join(root, sidecar))
            if isinstance(text, list):
                rows[name] = {**rows.get(name, {}), "text": text}
            elif name not in rows:
                skipped.append(Skip(sidecar, text))
        elif name not in rows:
            skipped.append(Skip(name, "no caption: neither a metadata row nor a .txt file beside it"))
    return rows, skipped


def _resolve(place: str, folder: str, row: Any) -> str | None:
    """The row's file relative to the data folder; None if it names none. ValueError if it leads out of the folder."""
    given = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(given, str) or not given:
        return None
    name = posixpath.normpath(posixpath.join(folder, given))
    if given.startswith("/") or name.startswith("../") or name == "..":
        raise ValueError(
            f"{place}: file_name {given[:200]!r} leads out of the data folder; name files relative to the folder of "
            "the metadata file"
        )
    return name


def _refusal(name: str | None, files: Mapping[str, int], rows: Mapping[str, Any]) -> str | None:
    if name is None:
        return "file_name is missing"
    if name not in files:
        return f"no such file: {name[:200]}"
    if name in rows:
        return f"duplicate file_name: {name[:200]}; its first row is used"
    return None
