"""Readers of metadata.jsonl, metadata.csv and sidecar .txt files; a line that can't be read becomes a reason."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

METADATA = ("metadata.jsonl", "metadata.csv")
MAX_LINE = 1 << 20  # bytes


def read_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line numbers, from 1, with a row each; or with the reason, as text, why there is none."""
    yield from _read_csv(path) if path.endswith(".csv") else _read_jsonl(path)


def read_sidecar(path: str) -> list[str] | str:
    """The captions of a .txt file, one for each line that is not blank; or the reason why there are none, as text."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_LINE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        return f"can't be read: {error.strerror}"
    except UnicodeDecodeError:
        return "not UTF-8 text"
    if len(data) > MAX_LINE:
        return f"more than {MAX_LINE} bytes of caption"
    return [line.strip() for line in text.splitlines() if line.strip()] or "empty caption"


def _read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | str:
    if len(line) > MAX_LINE:
        return f"line of {len(line)} bytes, more than {MAX_LINE}"
    try:
        row = json.loads(line, parse_constant=_refuse)
    except UnicodeDecodeError:
        return "not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {str(error)[:200]}"
    return row if isinstance(row, dict) else "not a JSON object"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_csv(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        header: list[str] | None = None
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader starts afresh at the next line
                yield reader.line_num, f"not CSV: {error}"
                continue
            if header is None:
                header = cells
            elif cells:
                yield reader.line_num, _row(header, cells)


def _row(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the first line names {len(header)} columns"
    if any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell):
        return "not UTF-8 text"
    return dict(zip(header, cells, strict=True))
