"""Rows with a column of pictures: parquet files, and Hugging Face datasets.

A picture is a cell: its bytes, {bytes, path} as `datasets` stores it, or the path of a file. The other columns make
captions as those of a metadata.jsonl do; a column of class labels has their names. Cells are read from memory-mapped
Arrow files. A saved dataset consists of such files; `datasets` makes them of one from the hub; a parquet file, whose
rows can only be had by unpacking thousands of them, is unpacked once into one in `data.index`, as large as its
pictures. Needs the extra `datasets`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Skip
from stipple_core.data.records.rows import SourceImage
from stipple_core.data.sources.locations import Shard, file_state, path_digest
from stipple_core.files.atomic import locked, writing
from stipple_core.images.images import UnusableImage

if TYPE_CHECKING:
    import pyarrow

ROWS = 256  # rows unpacked, or read for their captions, at a time


@dataclass(frozen=True, slots=True)
class ArrowFile:
    """Where the cells of a parquet file are: a `stipple_core.data.records.records.Source`."""

    path: str  # of the parquet file, for messages
    file: str  # the Arrow file that it was unpacked into
    column: str

    def open(self, place: int, size: int) -> str | IO[bytes]:
        """The picture of a row. Raises UnusableImage if there is none."""
        return _picture(_map(self.file)[self.column][place].as_py())

    def state(self) -> dict[str, Any]:
        """What changes when the contents do. Raises OSError."""
        return file_state(self.file)


@dataclass(frozen=True, slots=True)
class SavedDataset:
    """Where the cells of a dataset are: a `stipple_core.data.records.records.Source`."""

    path: str  # as the user named it
    split: str
    column: str

    def open(self, place: int, size: int) -> str | IO[bytes]:
        """The picture of a row. Raises UnusableImage if there is none."""
        table = _open_dataset(self.path, self.split)[place : place + 1]
        return _picture(table[self.column][0].as_py())

    def state(self) -> dict[str, Any]:
        """What changes when the contents do. Raises OSError."""
        rows = _open_dataset(self.path, self.split)
        return {"fingerprint": rows._fingerprint, "files": [file_state(each["filename"]) for each in rows.cache_files]}


def images_in_parquet(shard: Shard, config: DataConfig) -> Iterator[SourceImage | Skip]:
    """The pictures of a parquet file, row by row, and what can't be used of it.

    Raises ValueError if no column, or more than one, could hold the pictures.
    """
    try:
        state = shard.state()
    except FileNotFoundError:
        yield Skip(shard.name, "no such file")
        return
    arrow = _pyarrow()
    try:
        file = _unpacked(shard, state, config.index)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # a full disk; what Arrow finds wrong has no number
            raise
        yield Skip(shard.name, f"not a readable parquet file: {_line(error)}")
        return
    column = _image_column(_map(file).schema, config.image_column, shard.path)
    yield from _pictures(_map(file), column, shard.name, ArrowFile(shard.path, file, column))


def images_in_dataset(config: DataConfig) -> Iterator[SourceImage | Skip]:
    """The pictures of a dataset's split, row by row, and what can't be used of it.

    Raises ValueError if it can't be had, or if no column, or more than one, could hold the pictures.
    """
    name = config.dataset
    path = os.path.abspath(name) if os.path.isdir(name) else name
    rows = _open_dataset(path, config.split)
    column = _image_column(rows.features.arrow_schema, config.image_column, name)
    called = os.path.basename(path.rstrip("/"))
    yield from _pictures(rows, column, called, SavedDataset(path, config.split, column))


def _pictures(rows: Any, column: str, called: str, source: ArrowFile | SavedDataset) -> Iterator[SourceImage | Skip]:
    """The pictures of an Arrow table, or of a dataset that gives one when it is sliced."""
    for first in range(0, len(rows), ROWS):
        table = rows[first : min(first + ROWS, len(rows))]
        columns = _columns(table)
        for row, (values, size) in enumerate(zip(columns, _sizes(table[column]), strict=True), first):
            if size is None:
                yield Skip(f"{called}:{row}", "no picture in this row")
            else:
                yield SourceImage(source.path, f"{called}:{row}", values, size, source, row)


def _picture(cell: Any) -> str | IO[bytes]:
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None and path is None:
        raise UnusableImage("no picture in this row")
    return path if data is None else io.BytesIO(data)


def _sizes(cells: pyarrow.ChunkedArray) -> list[int | None]:
    """Bytes of each picture; None where there is none."""
    import pyarrow.compute as compute

    if not _is_struct(cells.type):
        return compute.binary_length(cells).to_pylist()
    sizes = compute.binary_length(compute.struct_field(cells, "bytes")).to_pylist()
    for row in (row for row, size in enumerate(sizes) if size is None):
        path = compute.struct_field(cells, "path")[row].as_py()
        sizes[row] = os.path.getsize(path) if path and os.path.isfile(path) else None
    return sizes


def _columns(table: pyarrow.Table) -> list[dict[str, Any]]:
    """Rows without what could be pictures or other files; class labels by their names."""
    features = _features(table.schema)
    table = table.select([field.name for field in table.schema if not _holds_files(field.type)])
    if not table.column_names:
        return [{} for _ in range(len(table))]
    rows = table.to_pylist()
    for column, feature in features.items():
        if feature.get("_type") == "ClassLabel" and column in table.column_names:
            for row in rows:
                if row[column] is not None and 0 <= row[column] < len(feature["names"]):
                    row[column] = feature["names"][row[column]]
    return rows


def _image_column(schema: pyarrow.Schema, asked: str | None, where: str) -> str:
    """The column that holds the pictures: the one that is asked for, or the only one that could."""
    features = _features(schema)
    able = [field.name for field in schema if _holds_files(field.type)]
    able = [name for name in able if features.get(name, {}).get("_type", "Image") in ("Image", "Value")]
    if asked in able:
        return asked
    if asked is not None:
        raise ValueError(f"data.image_column {asked} of {where} holds no pictures; use {' or '.join(able) or 'others'}")
    if len(able) != 1:
        what = f"the columns {', '.join(able)} could all hold" if able else f"none of {', '.join(schema.names)} holds"
        raise ValueError(f"{where}: {what} the pictures; say which by data.image_column=NAME")
    return able[0]


def _features(schema: pyarrow.Schema) -> dict[str, Any]:
    """What `datasets` noted of the columns; nothing if the file is of others."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _holds_files(kind: pyarrow.DataType) -> bool:
    return _is_binary(kind) or _is_struct(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_struct(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    names = {field.name for field in kind} if types.is_struct(kind) else set()
    return names == {"bytes", "path"} and _is_binary(kind.field("bytes").type)


def _unpacked(shard: Shard, state: dict[str, Any], folder: str) -> str:
    """The Arrow file of a parquet file's rows; it is made if there is none of this state."""
    arrow = _pyarrow()
    from pyarrow.parquet import ParquetFile

    os.makedirs(folder, exist_ok=True)
    path = os.path.abspath(os.path.join(folder, f"{path_digest(shard.path)}.arrow"))
    with locked(path):
        if not _is_current(path, state):
            with shard.stream() as stream, ParquetFile(stream) as parquet, writing(path) as file:
                schema = parquet.schema_arrow
                schema = schema.with_metadata({**(schema.metadata or {}), b"stipple": json.dumps(state).encode()})
                with arrow.ipc.new_stream(file, schema) as writer:
                    for batch in parquet.iter_batches(ROWS):
                        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            _map.cache_clear()
    return path


def _is_current(path: str, state: dict[str, Any]) -> bool:
    try:
        return json.loads(_map(path).schema.metadata[b"stipple"]) == state
    except (OSError, ValueError, KeyError, TypeError):  # none there, or cut short
        return False


@lru_cache(maxsize=4096)
def _map(file: str) -> pyarrow.Table:
    arrow = _pyarrow()
    return arrow.ipc.open_stream(arrow.memory_map(file)).read_all()


@lru_cache(maxsize=8)
def _open_dataset(path: str, split: str) -> Any:
    """A split whose slices are Arrow tables."""
    _pyarrow()
    import datasets

    try:
        if os.path.isdir(path):
            found = datasets.load_from_disk(path)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"it has no split {split}; use data.split={' or '.join(found)}")
                found = found[split]
        else:
            name, _, config = path.partition(":")
            found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # it raises its own and those of the hub's client, of many lines
        raise ValueError(f"data.dataset {path} can't be opened: {type(error).__name__}: {_line(error)}") from None
    return found.with_format("arrow")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError("parquet files and datasets need a package: pip install 'stipple[datasets]'") from None
    return pyarrow


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
