"""Parquet files and Hugging Face datasets: tables with a column of images. They need the extra `datasets`.

A cell contains an image file's bytes, {bytes, path} as `datasets` stores it, or the path of a file. Captions come from
the other columns, as with metadata.jsonl; class labels are replaced by their names. Cells are read from memory-mapped
Arrow files. Datasets consist of such files. A parquet file can't be read row by row, so it is unpacked once into an
Arrow file in `data.index`, which is as large as the images.
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
from stipple_core.data.sources.shards import Shard, file_state, path_digest
from stipple_core.data.sources.table_columns import image_column, image_sizes, plain_rows
from stipple_core.files.atomic import locked, writing
from stipple_core.images.images import UnusableImage

if TYPE_CHECKING:
    import pyarrow

ROWS = 256  # rows that are unpacked, or read for their captions, at a time


@dataclass(frozen=True, slots=True)
class ArrowFile:
    """A parquet file, unpacked into an Arrow file: a `stipple_core.data.records.records.Source`."""

    path: str  # of the parquet file, for messages
    file: str  # the Arrow file that it was unpacked into
    column: str

    def open(self, place: int, size: int) -> str | IO[bytes]:
        """Return the image in row `place`: its bytes or the path of its file. Raises UnusableImage if there is none."""
        return _image(_map(self.file)[self.column][place].as_py())

    def state(self) -> dict[str, Any]:
        """Values that change with the contents. Raises OSError."""
        return file_state(self.file)


@dataclass(frozen=True, slots=True)
class SavedDataset:
    """A Hugging Face dataset: a `stipple_core.data.records.records.Source`."""

    path: str  # as the user named it
    split: str
    column: str

    def open(self, place: int, size: int) -> str | IO[bytes]:
        """Return the image in row `place`: its bytes or the path of its file. Raises UnusableImage if there is none."""
        table = _open_dataset(self.path, self.split)[place : place + 1]
        return _image(table[self.column][0].as_py())

    def state(self) -> dict[str, Any]:
        """Values that change with the contents. Raises OSError."""
        rows = _open_dataset(self.path, self.split)
        return {"fingerprint": rows._fingerprint, "files": [file_state(each["filename"]) for each in rows.cache_files]}


def images_in_parquet(shard: Shard, config: DataConfig) -> Iterator[SourceImage | Skip]:
    """Yield the images of a parquet file row by row, and a Skip for each row without one, or for an unreadable file.

    Raises:
        ValueError: not exactly one column could contain the images.
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
        if isinstance(error, OSError) and error.errno:  # a full disk, for example; Arrow's own errors have no number
            raise
        yield Skip(shard.name, f"not a readable parquet file: {_line(error)}")
        return
    column = image_column(_map(file).schema, config.image_column, shard.path)
    yield from _images(_map(file), column, shard.name, ArrowFile(shard.path, file, column))


def images_in_dataset(config: DataConfig) -> Iterator[SourceImage | Skip]:
    """Yield the images of a dataset's split row by row, and a Skip for each row without one.

    Raises:
        ValueError: the dataset can't be opened, or not exactly one column could contain the images.
    """
    name = config.dataset
    path = os.path.abspath(name) if os.path.isdir(name) else name
    rows = _open_dataset(path, config.split)
    column = image_column(rows.features.arrow_schema, config.image_column, name)
    table_name = os.path.basename(path.rstrip("/"))
    yield from _images(rows, column, table_name, SavedDataset(path, config.split, column))


def _images(rows: Any, column: str, table_name: str, source: ArrowFile | SavedDataset) -> Iterator[SourceImage | Skip]:
    """The images of an Arrow table, or of a dataset whose slices are Arrow tables."""
    for first in range(0, len(rows), ROWS):
        table = rows[first : min(first + ROWS, len(rows))]
        columns = plain_rows(table)
        for row, (values, size) in enumerate(zip(columns, image_sizes(table[column]), strict=True), first):
            if size is None:
                yield Skip(f"{table_name}:{row}", "no image in this row")
            else:
                yield SourceImage(source.path, f"{table_name}:{row}", values, size, source, row)


def _image(cell: Any) -> str | IO[bytes]:
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if data is None and path is None:
        raise UnusableImage("no image in this row")
    return path if data is None else io.BytesIO(data)


def _unpacked(shard: Shard, state: dict[str, Any], folder: str) -> str:
    """Return the Arrow file with the rows of a parquet file; it is written unless there is one of this state."""
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
    except (OSError, ValueError, KeyError, TypeError):  # it does not exist or is truncated
        return False


@lru_cache(maxsize=4096)
def _map(file: str) -> pyarrow.Table:
    arrow = _pyarrow()
    return arrow.ipc.open_stream(arrow.memory_map(file)).read_all()


@lru_cache(maxsize=8)
def _open_dataset(path: str, split: str) -> Any:
    """Open a split of a dataset, whose slices are Arrow tables."""
    _pyarrow()
    import datasets

    try:
        if os.path.isdir(path):
            dataset = datasets.load_from_disk(path)
            if isinstance(dataset, datasets.DatasetDict):
                if split not in dataset:
                    raise ValueError(f"it has no split {split}; use data.split={' or '.join(dataset)}")
                dataset = dataset[split]
        else:
            name, _, config = path.partition(":")
            dataset = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # errors of the library and of the hub's client, of many lines
        raise ValueError(f"data.dataset {path} can't be opened: {type(error).__name__}: {_line(error)}") from None
    return dataset.with_format("arrow")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError("parquet files and datasets need a package: pip install 'stipple[datasets]'") from None
    return pyarrow


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
