"""Columns of Arrow tables: which one contains the images, and rows of the others as plain values."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


def image_column(schema: pyarrow.Schema, requested: str | None, where: str) -> str:
    """Return the column that contains the images: the requested one, or the only one that could.

    Raises:
        ValueError: the requested column does not contain images, or not exactly one column could.
    """
    features = _features(schema)
    able = [field.name for field in schema if _holds_files(field.type)]
    able = [name for name in able if features.get(name, {}).get("_type", "Image") in ("Image", "Value")]
    if requested in able:
        return requested
    if requested is not None:
        choices = " or ".join(able) or "another column"
        raise ValueError(f"data.image_column {requested} of {where} does not contain images; use {choices}")
    if len(able) != 1:
        if not able:
            raise ValueError(f"{where}: none of the columns {', '.join(schema.names)} contains images")
        several = f"the columns {', '.join(able)} could all contain the images"
        raise ValueError(f"{where}: {several}; choose one by data.image_column=NAME")
    return able[0]


def plain_rows(table: pyarrow.Table) -> list[dict[str, Any]]:
    """The rows of a table without columns of images or other files, and with names of class labels."""
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


def image_sizes(cells: pyarrow.ChunkedArray) -> list[int | None]:
    """The size in bytes of each image in a column; None for an empty cell."""
    import pyarrow.compute as compute

    if not _is_struct(cells.type):
        return compute.binary_length(cells).to_pylist()
    sizes = compute.binary_length(compute.struct_field(cells, "bytes")).to_pylist()
    for row in (row for row, size in enumerate(sizes) if size is None):
        path = compute.struct_field(cells, "path")[row].as_py()
        sizes[row] = os.path.getsize(path) if path and os.path.isfile(path) else None
    return sizes


def _features(schema: pyarrow.Schema) -> dict[str, Any]:
    """The column types that the library `datasets` stores in a file; {} for files of other programs."""
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
