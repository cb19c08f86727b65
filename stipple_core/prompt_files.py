"""Files of prompts: one per line, or one JSON object per line with settings of its own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


def read_prompts(path: Path, known: Collection[str]) -> Iterator[dict[str, Any]]:
    """The settings on each line that is not blank: {"prompt": line}, or the JSON object that it holds.

    Args:
        path: a text file in UTF-8.
        known: keys that a JSON object may have; "prompt" it must have.

    Raises:
        FileNotFoundError, ValueError: in one line, naming the file, the line, and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist; give a text file with one prompt per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError:
        raise ValueError(f"prompt file {path} is not UTF-8 text; save it as that") from None
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        if not line.lstrip().startswith("{"):
            if line.strip():
                yield {"prompt": line.strip()}
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} begins with {{ but is not a JSON object ({error}); mend or remove it") from None
        yield check_settings(values, known, where)


def check_settings(values: Any, known: Collection[str], where: str) -> dict[str, Any]:
    """The values, if they are a dict with a prompt, whose keys are all known; else a ValueError naming what is not."""
    if not isinstance(values, dict) or "prompt" not in values:
        raise ValueError(f'{where} has no prompt; it must hold {{"prompt": "...", ...}}')
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has {key!r}, which is no setting; did you mean {nearest}?")
    return values
