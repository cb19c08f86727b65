"""Captions: text cleaning, and templates such as "{name}, {style} style" over the columns of a metadata row.

For a column with a list, "{keywords}" makes one caption for each element, and "{keywords:3}" puts three elements into
one caption.
A column of objects, [{"label": "cat", "box": [0.1, 0.2, 0.5, 0.9]}, ...], becomes the layout "cat 0.1 0.2 0.5 0.9;
...".
"""

from __future__ import annotations

import hashlib
import itertools
import math
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MAX_LENGTH = 10_000  # characters; longer captions are truncated
DRAWS = 3  # captions from a field such as {keywords:3}, each with other elements
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
    """Return the column names of a template. Raises ValueError as `fields_of`."""
    return tuple(dict.fromkeys(field.partition(":")[0] for field in fields_of(template)))


def fields_of(template: str) -> tuple[str, ...]:
    """Return the fields of a template, such as ("name", "keywords:3").

    Raises:
        ValueError: braces do not match, or contain more than a column name and a number.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"caption template {template!r}: {error}; write {{name}} for a column and {{{{ for a brace"
        ) from None
    fields = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or conversion or (form and not (form.isdecimal() and int(form) >= 1)):
            raise ValueError(
                f"caption template {template!r} must contain plain column names, such as {{text}}, or a "
                "name and a number of elements, such as {{keywords:3}}"
            )
        fields.append(f"{name}:{form}" if form else name)
    return tuple(dict.fromkeys(fields))


def expand(template: str, fields: Sequence[str], row: Mapping[str, Any]) -> tuple[str, ...]:
    """Fill a template from a row: one caption for each element of a column with a list, none if a column is missing.

    A field such as {keywords:3} makes `DRAWS` captions. Each contains three elements of the list, or all if there are
    fewer, separated by commas; a hash of the elements selects them and their order.

    Args:
        template: text with {column} or {column:number} fields.
        fields: `fields_of(template)`.
        row: a metadata row.

    Raises:
        ValueError: there are too many captions, or one is empty.
    """
    choices = [_choices(field, row) for field in fields]
    if not all(choices):
        return ()
    if math.prod(map(len, choices)) > MAX_EXPANSIONS:
        raise ValueError(f"template {template!r} makes more than {MAX_EXPANSIONS} captions from one row")
    captions = []
    for values in itertools.product(*choices):
        captions.append(clean(_fill(template, dict(zip(fields, values, strict=True)))))
    return tuple(captions)


def _fill(template: str, values: Mapping[str, str]) -> str:
    parts = string.Formatter().parse(template)  # not str.format: a column named "a.b" is a column, never an attribute
    fields = ((text, name if not form else f"{name}:{form}") for text, name, form, _ in parts)
    return "".join(text + (values[field] if field is not None else "") for text, field in fields)


def _choices(field: str, row: Mapping[str, Any]) -> list[str]:
    """The texts of a field: the elements of a column, or up to `DRAWS` texts of several elements each."""
    column, _, count = field.partition(":")
    elements = _elements(row.get(column))
    if not count or not elements:
        return elements
    joined = "\n".join(elements)

    def position(draw: int, element: str) -> bytes:
        text = f"{draw}\n{element}\n{joined}"
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()

    drawn = (sorted(elements, key=lambda element, draw=draw: position(draw, element)) for draw in range(DRAWS))
    return list(dict.fromkeys(", ".join(texts[: int(count)]) for texts in drawn))


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
