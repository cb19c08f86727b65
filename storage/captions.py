"""Captions from columns: clean text, and templates such as "{name}, {style} style" over a metadata row's columns.

Of a column that is a list a template shows one element at a time, "{keywords}", or several, "{keywords:3}".
A column of objects, [{"label": "cat", "box": [0.1, 0.2, 0.5, 0.9]}, ...], reads "cat 0.1 0.2 0.5 0.9; ...": a layout.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MAX_LENGTH = 10_000  # characters; what comes after is cut off
DRAWS = 3  # captions from a field such as {keywords:3}, each with other elements
MAX_EXPANSIONS = 1_000  # captions from one template, when several columns are lists
SPACES = {code: " " for code in (*range(32), *range(127, 160))}  # control characters, NUL and line ends among them


def clean(text: str) -> str:
    """One line of NFC text of at most MAX_LENGTH characters; ValueError if nothing is left.

    Each run of whitespace and control characters (NUL too) becomes one space, each half of a surrogate pair U+FFFD.
    Undecodable bytes have become U+FFFD when the file was read (`storage.metadata`).
    """
    if not text.isprintable():  # cheap: most captions have nothing to replace
        text = text.translate(SPACES).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = " ".join(text.split())[:MAX_LENGTH]  # before NFC, whose time grows with the square of a run of accents
    if not text.isascii():
        text = " ".join(unicodedata.normalize("NFC", text).split())[:MAX_LENGTH]
    text = text.rstrip()
    if not text:
        raise ValueError("empty caption")
    return text


def columns_of(template: str) -> tuple[str, ...]:
    """The column names of a template; ValueError if the braces hold more than a name and a number."""
    return tuple(dict.fromkeys(field.partition(":")[0] for field in fields_of(template)))


def fields_of(template: str) -> tuple[str, ...]:
    """The fields of a template, such as ("name", "keywords:3"); ValueError as `columns_of`."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"caption template {template!r}: {error}; a column is {{name}}, a brace {{{{") from None
    fields = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or conversion or (form and not (form.isdecimal() and int(form) >= 1)):
            raise ValueError(f"caption template {template!r} must hold plain column names, such as {{text}}")
        fields.append(f"{name}:{form}" if form else name)
    return tuple(dict.fromkeys(fields))


def expand(template: str, fields: Sequence[str], row: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions that a template makes of a row: one per element of a list-valued column, none if one is missing.

    Of a field such as {keywords:3} there are `DRAWS`, each with three of the elements, drawn by a hash of them, in the
    order in which they were drawn, with commas between; of a column with fewer elements, all of them.

    Args:
        template: text with {column} or {column:number} fields.
        fields: `fields_of(template)`.
        row: a metadata row.

    Raises ValueError if there are too many captions, or one is empty.
    """
    choices = [_choices(field, row) for field in fields]
    if not all(choices):
        return ()
    if math.prod(map(len, choices)) > MAX_EXPANSIONS:
        raise ValueError(f"template {template!r} makes more than {MAX_EXPANSIONS} captions of one row")
    captions = []
    for values in itertools.product(*choices):
        captions.append(clean(_fill(template, dict(zip(fields, values, strict=True)))))
    return tuple(captions)


def _fill(template: str, values: Mapping[str, str]) -> str:
    parts = string.Formatter().parse(template)  # not str.format: a column named "a.b" is a column, never an attribute
    fields = ((text, name if not form else f"{name}:{form}") for text, name, form, _ in parts)
    return "".join(text + (values[field] if field is not None else "") for text, field in fields)


def _choices(field: str, row: Mapping[str, Any]) -> list[str]:
    """The texts that a field offers: the elements of a column, or `DRAWS` texts with several of them each."""
    column, _, count = field.partition(":")
    elements = _elements(row.get(column))
    if not count or not elements:
        return elements
    together = "\n".join(elements)

    def place(draw: int, element: str) -> bytes:
        text = f"{draw}\n{element}\n{together}"
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()

    drawn = (sorted(elements, key=lambda element, draw=draw: place(draw, element)) for draw in range(DRAWS))
    return list(dict.fromkeys(", ".join(texts[: int(count)]) for texts in drawn))


def _elements(value: Any) -> list[str]:
    """A column's value as the texts it offers; blanks, null and mappings offer none."""
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
    """Objects with a label and a box as one text; none where one of them has not both."""
    if not all(item.get("label") is not None and isinstance(item.get("box"), list) for item in objects):
        return []
    return ["; ".join(" ".join(map(str, [item["label"], *item["box"]])) for item in objects)]
