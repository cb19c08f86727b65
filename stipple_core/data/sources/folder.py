"""Images in a folder and its subfolders, with captions in metadata files or sidecars, as in Hugging Face datasets.

Captions come from the rows of metadata.jsonl or metadata.csv at any level, whose `file_name` is relative to their own
folder, or from NAME.txt beside NAME.png (column "text"; each line is one caption). Unusable entries are skipped with a
reason.

Scanning needs one `os.scandir` per folder and opens no image: the listing shows that a file exists and is not empty.
Damaged images are detected when they are decoded (`stipple_core.data.verify`, `stipple_core.data.dataset`).
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
    """Yield a Skip for each unusable entry of a folder, then its images ordered by name.

    Args:
        root: the absolute path of the folder.
        files: the result of `walk`.
        captioned: whether an image needs a caption.
    """
    rows, skipped = _gather_rows(root, files)
    if not captioned:
        rows |= {name: {} for name in files if is_image_name(name) and name not in rows}
        skipped = [skip for skip in skipped if skip.path not in rows and not skip.path.endswith(".txt")]
    yield from skipped
    for name in sorted(rows):
        yield SourceImage(os.path.join(root, name), name, rows.pop(name), files[name])


def walk(root: str, folder: str) -> Iterator[tuple[str, int]]:
    """Yield name, relative to `root`, and size of all visible files; size -1 is a directory named like an image."""
    with os.scandir(os.path.join(root, folder)) as entries:
        listing = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in listing:
        name = posixpath.join(folder, entry.name)
        try:
            if entry.is_dir():
                if is_image_name(name):
                    yield name, -1
                elif not entry.is_symlink():  # a linked folder could contain its own parent
                    yield from walk(root, name)
            else:
                yield name, entry.stat().st_size
        except OSError:
            yield name, 0  # a broken link, or no permission: treated as an empty file


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return name.lower().endswith(EXTENSIONS)


def _gather_rows(root: str, files: Mapping[str, int]) -> tuple[dict[str, dict[str, Any]], list[Skip]]:
    """Rows by file name, from metadata files and then from sidecars, and a Skip for each unusable one."""
    rows: dict[str, dict[str, Any]] = {}
    skipped: list[Skip] = []
    metadata_files = (name for name in files if posixpath.basename(name) in METADATA)
    for metadata in sorted(metadata_files, key=lambda name: -name.count("/")):  # the nearest one describes an image
        for line, row in read_rows(os.path.join(root, metadata)):
            place = f"{metadata}:{line}"
            name = _resolve(place, posixpath.dirname(metadata), row)
            reason = row if isinstance(row, str) else _problem(name, files, rows)
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
    """The file name of a row, relative to the data folder; None if there is none.

    Raises:
        ValueError: the file is outside the data folder.
    """
    file_name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(file_name, str) or not file_name:
        return None
    name = posixpath.normpath(posixpath.join(folder, file_name))
    if file_name.startswith("/") or name.startswith("../") or name == "..":
        raise ValueError(
            f"{place}: file_name {file_name[:200]!r} is outside the data folder; use a name relative to the folder of "
            "the metadata file"
        )
    return name


def _problem(name: str | None, files: Mapping[str, int], rows: Mapping[str, Any]) -> str | None:
    """Why the row of a file name can't be used; None if it can."""
    if name is None:
        return "file_name is missing"
    if name not in files:
        return f"no such file: {name[:200]}"
    if name in rows:
        return f"duplicate file_name: {name[:200]}; its first row is used"
    return None
