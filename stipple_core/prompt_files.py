"""Prompt files: one prompt per line, or one JSON object per line with a prompt and its own settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from stipple_core.nearest import did_you_mean


def read_prompts(path: Path, valid: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the settings on each line that is not blank: {"prompt": line}, or the JSON object that the line contains.

    Args:
        path: a text file in UTF-8.
        valid: keys that a JSON object may have. The key "prompt" is required.

    Raises:
        FileNotFoundError, ValueError: the message names the file, the line and the error.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist; use a text file with one prompt per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError:
        raise ValueError(f"prompt file {path} is not UTF-8 text; save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        if not line.lstrip().startswith("{"):
            if line.strip():
                yield {"prompt": line.strip()}
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} begins with {{ but is not a JSON object ({error}); fix or remove it") from None
        yield check_settings(values, valid, where)


def check_settings(values: Any, valid: Collection[str], where: str) -> dict[str, Any]:
    """Return the values if they are a dict with a "prompt" and only valid keys; otherwise raise a ValueError."""
    if not isinstance(values, dict) or "prompt" not in values:
        raise ValueError(f'{where} has no prompt; it must contain {{"prompt": "...", ...}}')
    for key in values:
        if key not in valid:
            raise ValueError(f"{where} has {key!r}, which is not a setting; did you mean {did_you_mean(key, valid)}?")
    return values
