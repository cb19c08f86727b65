"""Reading metadata.jsonl, metadata.csv and sidecar .txt files. Instead of an unreadable row, the reason is returned.

Text is UTF-8, with or without a byte order mark; sidecars may also be UTF-16 with one. Undecodable bytes become U+FFFD.
`stipple_core.data.records.captions.clean` replaces control characters.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

METADATA = ("metadata.jsonl", "metadata.csv")
MAX_LINE = 1 << 20  # bytes


def read_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield line number (from 1) and row, or instead of an unreadable row the reason as text."""
    yield from _read_csv(path) if path.endswith(".csv") else _read_jsonl(path)


def read_sidecar(path: str) -> list[str] | str:
    """Return the captions of a .txt file, one for each nonblank line, or the reason as text if there are none."""
    try:
        with open(path, "rb") as file:
            return parse_captions(file.read(MAX_LINE + 1))
    except OSError as error:
        return f"can't be read: {error.strerror}"


def parse_captions(data: bytes) -> list[str] | str:
    """Return the captions in the contents of a .txt file, or the reason as text if there are none."""
    if len(data) > MAX_LINE:
        return f"caption too long: more than {MAX_LINE} bytes"
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    lines = (line.strip() for line in data.decode(encoding, "replace").splitlines())
    return [line for line in lines if line] or "empty caption"


def _read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, parse_row(line)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines, truncated shortly after MAX_LINE: a file of many GB may be a single line."""
    while line := file.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE + 1)


def parse_row(line: bytes) -> dict[str, Any] | str:
    """Return the row in a line of JSON, or the reason as text if there is none."""
    if len(line) > MAX_LINE:
        return f"line too long: more than {MAX_LINE} bytes"
    try:
        row = json.loads(line.decode(errors="replace"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {str(error)[:200]}"
    return row if isinstance(row, dict) else "not a JSON object"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_csv(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        header: list[str] | None = None
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader continues at the next line
                yield reader.line_num, f"not CSV: {error}"
                continue
            if header is None:
                header = cells
            elif cells:
                yield reader.line_num, _row(header, cells)


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the first line has {len(header)} columns"
    return dict(zip(header, cells, strict=True))
