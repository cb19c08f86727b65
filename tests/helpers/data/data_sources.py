"""Small data sources for tests: folders of captioned images and webdataset tars, and their configs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Records


def png_image(number: int = 0) -> bytes:
    """A PNG file of 8 x 8 pixels in a color of its own for each number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 20 % 256, number // 12, 0)).save(file, "PNG")
    return file.getvalue()


def tar_header(name: str, **fields) -> tarfile.TarInfo:
    """The header of a tar member, with some fields set."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def make_tar(members: list, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, contents) and headers, with the usual end marker of zero blocks up to 10 KiB."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tar_header(member[0], size=len(member[1]))
            tar.addfile(info, None if isinstance(member, tarfile.TarInfo) else io.BytesIO(member[1]))
    return file.getvalue()


def captioned_image(key: str, number: int = 0, text: str | None = None) -> list:
    """The members KEY.png and KEY.txt of a tar."""
    return [(f"{key}.png", png_image(number)), (f"{key}.txt", (text or key).encode())]


def make_folder(folder: Path, rows: list, names: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> Path:
    """A folder with images of one color and a metadata.jsonl. Rows are dicts, or the bytes of a line."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(folder / name)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return folder


def folder_config(folder: str | Path, **options) -> DataConfig:
    """The config of a folder, with all images in the training split and any number of bad ones."""
    defaults = {"folder": str(folder), "image_size": 16, "validation": 0.0, "max_bad_fraction": 1.0}
    return DataConfig(**{**defaults, **options})


def shard_config(place: Path, **options) -> DataConfig:
    """The config of the tars in a folder, with all images in the training split and any number of bad ones."""
    defaults = {"shards": str(place / "*.tar"), "index": str(place / "index"), "image_size": 16, "validation": 0.0}
    return DataConfig(**{**defaults, "max_bad_fraction": 1.0, **options})


def captions_by_name(records: Records) -> dict[str, tuple]:
    """The captions of all training records."""
    return {record.name: record.captions for record in records.train}


def reasons(records: Records) -> dict[str, str]:
    """The reasons of all skipped entries."""
    return {skip.path: skip.reason for skip in records.skipped}
