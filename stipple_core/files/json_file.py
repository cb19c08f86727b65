"""JSON objects in files: read with checks, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stipple_core.files.atomic import writing

MAX_BYTES = 1 << 26  # the index of a model in several weight files, with 100,000 weights, has about 10 MB


def read_json(path: str | os.PathLike, absent: str | None = None, fix: str = "get it again") -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        absent: the error message if the file does not exist. None: a message for files of a model folder.
        fix: what the error message of an unreadable file tells the user to do.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not JSON, or its value is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(absent or f"{path} does not exist; is the model folder complete?")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, a JSON file at most {MAX_BYTES}; {fix}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"{path} is not readable JSON ({reason}); {fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not contain a JSON object; {fix}")
    return value


def write_json(value: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write an object as a JSON file, with sorted keys; atomically and durably."""
    with writing(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
