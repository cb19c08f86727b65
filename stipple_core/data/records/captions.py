"""Captions: text cleaning, and templates such as "{name}, {style} style" over the columns of a metadata row.

A column of objects, [{"label": "cat", "box": [0.1, 0.2, 0.5, 0.9]}, ...], becomes the layout "cat 0.1 0.2 0.5 0.9;
...".
"""

from __future__ import annotations

import itertools
import math
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MAX_LENGTH = 10_000  # characters; longer captions are truncated
MAX_EXPANSIONS = 1_000  # captions of one template for one row
SPACES = {code: " " for code in (*range(32), *range(127, 160))}  # control characters, including NUL and line ends


def clean(text: str) -> str:
    """Return text as one line of at most MAX_LENGTH characters in Unicode normalization form C.

    Each run of whitespace and control characters becomes one space, each lone surrogate U+FFFD. Undecodable bytes
    became U+FFFD when the file was read (`stipple_core.data.sources.metadata`).

    Raises:
        ValueError: no text is left.
    """
    if not text.isprintable():  # a fast check: most captions need no replacement
        text = text.translate(SPACES).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = " ".join(text.split())[:MAX_LENGTH]  # before NFC, whose time is quadratic in runs of accents
    if not text.isascii():
        text = " ".join(unicodedata.normalize("NFC", text).split())[:MAX_LENGTH]
    text = text.rstrip()
    if not text:
        raise ValueError("empty caption")
    return text


def columns_of(template: str) -> tuple[str, ...]:
    """Return the column names of a template. Raises ValueError if braces do not match or contain more than a name."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"caption template {template!r}: {error}; write {{name}} for a column and {{{{ for a brace"
        ) from None
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError(f"caption template {template!r} must contain plain column names, such as {{text}}")
        names.append(name)
    return tuple(dict.fromkeys(names))


def expand(template: str, columns: Sequence[str], row: Mapping[str, Any]) -> tuple[str, ...]:
    """Fill a template from a row: one caption for each element of a column with a list, none if a column is missing.

    Args:
        template: text with {column} fields.
        columns: `columns_of(template)`.
        row: a metadata row.

    Raises:
        ValueError: there are too many captions, or one is empty.
    """
    choices = [_elements(row.get(column)) for column in columns]
    if not all(choices):
        return ()
    if math.prod(map(len, choices)) > MAX_EXPANSIONS:
        raise ValueError(f"template {template!r} makes more than {MAX_EXPANSIONS} captions from one row")
    captions = []
    for values in itertools.product(*choices):
        captions.append(clean(_fill(template, dict(zip(columns, values, strict=True)))))
    return tuple(captions)


def _fill(template: str, values: Mapping[str, str]) -> str:
    parts = string.Formatter().parse(template)  # not str.format: a column named "a.b" is a column, never an attribute
    return "".join(text + (values[name] if name is not None else "") for text, name, _, _ in parts)


def _elements(value: Any) -> list[str]:
    """The texts in a column's value; blank texts, null and mappings have none."""
    if isinstance(value, str):
        return [value.strip()] if value.translate(SPACES).strip() else []
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return _layout(value)
    if isinstance(value, list):
        return [text for item in value if not isinstance(item, list) for text in _elements(item)]
    if value is None or isinstance(value, Mapping):
        return []
    return [str(value)]


def _layout(objects: list[Mapping[str, Any]]) -> list[str]:
    """Objects as one layout text; none if an object lacks a label or a box."""
    if not all(item.get("label") is not None and isinstance(item.get("box"), list) for item in objects):
        return []
    return ["; ".join(" ".join(map(str, [item["label"], *item["box"]])) for item in objects)]
