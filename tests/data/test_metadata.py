"""Metadata files and sidecars: text is normalized, long lines are rejected, and no line stops a scan."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from stipple_core.data.records.captions import MAX_LENGTH, expand
from stipple_core.data.sources.metadata import MAX_LINE, parse_captions, parse_row, read_rows
from stipple_core.data.sources.scan import scan
from tests.helpers.data.data_sources import captions_by_name, folder_config, make_folder, reasons

PNGS = ("a.png", "b.png", "c.png", "d.png")
UNUSUAL = {"a": "nul\0bell\7", "b": "half\ud800", "c": "x" * 500_000, "d": "e\u0301"}
NORMALIZED = {"a": "nul bell", "b": "half\ufffd", "c": "x" * MAX_LENGTH, "d": "\xe9"}


def bad_bytes(text: str) -> bytes:
    """UTF-8 with an invalid byte instead of a lone surrogate."""
    return text.encode(errors="replace").replace(b"half?", b"half\xff")


def write_jsonl(folder: Path) -> None:
    make_folder(folder, [{"file_name": f"{name}.png", "text": text} for name, text in UNUSUAL.items()], PNGS)


def write_sidecars(folder: Path) -> None:
    make_folder(folder, [], PNGS)
    for name, text in UNUSUAL.items():
        (folder / f"{name}.txt").write_bytes(bad_bytes(text))


def write_csv(folder: Path) -> None:
    make_folder(folder, [], PNGS)
    shorter = {**UNUSUAL, "c": "x" * 100_000}  # a cell has at most 131,072 characters
    lines = [bad_bytes(f"{name}.png,{text}") for name, text in shorter.items()]
    (folder / "metadata.csv").write_bytes(b"\n".join([b"file_name,text", *lines]))


@pytest.mark.parametrize("write", [write_jsonl, write_sidecars, write_csv])
def test_unusual_captions_are_normalized_in_the_same_way_in_every_file(tmp_path, write):
    write(tmp_path)
    assert captions_by_name(scan(folder_config(tmp_path))) == {
        f"{name}.png": ((text,),) for name, text in NORMALIZED.items()
    }


def test_long_captions_are_truncated_and_longer_lines_are_rejected():
    assert expand("{text}", ("text",), {"text": parse_captions(b"x" * 1_000_000)}) == ("x" * MAX_LENGTH,)
    assert "too long" in parse_captions(b"x" * (MAX_LINE + 1)) and "too long" in parse_row(b" " * (MAX_LINE + 1))


def test_sidecars_may_be_utf_16():
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert parse_captions("caf\xe9\r\n\nice".encode(encoding)) == ["caf\xe9", "ice"]


def test_very_long_lines_are_skipped_without_reading_them_at_once(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(b"x" * (5 * MAX_LINE) + b'\n{"a": 1}\n\n' + b"y" * (MAX_LINE + 1) + b'\n{"a": 2}')
    rows = dict(read_rows(str(path)))
    assert rows.pop(2) == {"a": 1} and rows.pop(5) == {"a": 2}
    assert sorted(rows) == [1, 4] and all("too long" in reason for reason in rows.values())


def test_missing_captions_may_be_empty_captions(tmp_path):
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": ""}]
    make_folder(tmp_path, rows, PNGS)
    (tmp_path / "d.txt").write_text(" ")
    records = scan(folder_config(tmp_path, missing_caption="empty"))
    assert captions_by_name(records) == {"a.png": (("a",),), "b.png": (("",),), "c.png": (("",),), "d.png": (("",),)}
    assert not records.skipped and len(scan(folder_config(tmp_path)).skipped) == 3


@pytest.mark.parametrize("name", ["../a.png", "q/../../a.png", "/etc/passwd", "..", "sub/../../x"])
def test_a_csv_row_with_a_file_outside_the_folder_is_an_error(tmp_path, name):
    make_folder(tmp_path, [])
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,good\n{name},x\n")
    with pytest.raises(ValueError, match="metadata.csv:3: file_name '.*' is outside the data folder; use a name"):
        scan(folder_config(tmp_path))


def test_images_beyond_max_aspect_are_skipped(tmp_path):
    make_folder(tmp_path, [{"file_name": name, "text": "x"} for name in PNGS[:3]], PNGS[:3])
    Image.new("RGB", (9, 28)).save(tmp_path / "b.png")
    Image.new("RGB", (27, 9)).save(tmp_path / "c.png")
    records = scan(folder_config(tmp_path, max_aspect=3))
    assert set(captions_by_name(records)) == {"a.png", "c.png"}
    assert reasons(records) == {"b.png": "too narrow: 9 x 28, beyond data.max_aspect 3"}


@pytest.mark.parametrize("options", [{"missing_caption": "no"}, {"max_aspect": 0.5}, {"max_aspect": float("nan")}])
def test_errors_in_options_name_the_option(options):
    with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
        folder_config("x", **options)


SEEDS = (
    json.dumps({"file_name": "a.png", "text": "a \u96ea", "size": [1, {"x": None}], "keywords": ["x", "y"]}).encode(),
    b'{"file_name": "sub/b.png", "text": "\xc3\xa9\\ud83d\\ude00", "deep": ' + b"[" * 40 + b"]" * 40 + b"}",
    b'file_name,text\r\na.png,"one, ""two"""\r\nb.png,\'x\'\r\n',
    b"first caption\nsecond \xe2\x80\x94 one\n",
)
PIECES = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"{",
    b"[",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b",",
    b"9" * 30,
)


def mutated(draw: random.Random) -> bytes:
    """A line or file with up to six places overwritten, deleted, repeated, or replaced by difficult bytes."""
    data = bytearray(draw.choice(SEEDS))
    for _ in range(draw.randint(1, 6)):
        at, length = draw.randrange(len(data) + 1), draw.randint(0, 8)
        data[at : at + length] = draw.choice(
            (draw.randbytes(length), b"", data[at : at + length] * 2, draw.choice(PIECES))
        )
    return bytes(data)


def fuzz(count: int, seed: int) -> None:
    """Check that each mutated input gives a row or a reason, and that captions of rows are clean."""
    draw = random.Random(seed)
    for _ in range(count):
        data = mutated(draw)
        texts = parse_captions(data)
        assert isinstance(texts, str) or texts
        row = parse_row(data)
        for each in (row, {"text": texts}):
            if isinstance(each, dict):
                captions = [
                    *expand("{text}", ("text",), each),
                    *expand("{keywords} {size}", ("keywords", "size"), each),
                ]
                assert all(caption and caption.encode() and len(caption) <= MAX_LENGTH for caption in captions)


def test_no_line_stops_a_scan():
    fuzz(3_000, seed=0)


@pytest.mark.slow
def test_no_line_of_a_million_stops_a_scan():
    fuzz(1_000_000, seed=1)


def test_only_files_outside_the_folder_and_unknown_columns_stop_a_scan(tmp_path):
    draw, folder = random.Random(0), make_folder(tmp_path, [], PNGS)
    options = dataclasses.replace(folder_config(folder), missing_caption="empty")
    for number in range(300):
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        (folder / ("metadata.jsonl", "metadata.csv", "a.txt")[number % 3]).write_bytes(mutated(draw))
        try:
            assert len(scan(options).train) == 4
        except ValueError as error:
            assert "is outside the data folder" in str(error) or "names the column 'text'" in str(error), error
