"""Folders of captioned images: all captions are found, and each unusable entry is skipped with its reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from stipple_core.data.records.records import fingerprint, write_skipped
from stipple_core.data.sources.scan import scan
from tests.helpers.data.data_sources import captions_by_name, folder_config, make_folder, reasons

PICTURES = Path(__file__).parents[2] / "tests" / "pictures"


def test_images_with_metadata_and_sidecars_are_all_found():
    records = scan(folder_config(PICTURES, captions=["{text}", "{name}", "{keywords}, {style} style"]))
    assert len(records.train) == 42 and not records.skipped
    captions = captions_by_name(records)
    assert captions["photos/lemon.webp"] == (("a photo of lemon in a grocery store",),)
    text, name, keywords = captions["noto/1f419.webp"]
    assert (text, name) == (("octopus, noto style",), ("octopus",))
    assert len(keywords) > 2 and all(caption.endswith(", noto style") for caption in keywords)


def test_csv_and_jsonl_give_the_same_records(tmp_path):
    tones = {"a": "x", "b": None, "c": "y"}
    rows = [{"file_name": f"{name}.png", "text": f'a "{name}", yes', "tone": tone} for name, tone in tones.items()]
    make_folder(tmp_path / "jsonl", rows)
    make_folder(tmp_path / "csv", [])
    (tmp_path / "csv" / "metadata.jsonl").unlink()
    lines = [f'"{name}.png","a ""{name}"", yes",{tone or ""}' for name, tone in tones.items()]
    (tmp_path / "csv" / "metadata.csv").write_text("\ufefffile_name,text,tone\r\n" + "\r\n".join(lines), "utf-8")
    for where in ({}, {"tone": ["x", None]}, {"tone": ["y"]}):
        assert captions_by_name(scan(folder_config(tmp_path / "csv", where=where))) == captions_by_name(
            scan(folder_config(tmp_path / "jsonl", where=where))
        )


def test_metadata_files_are_relative_to_their_folder_and_the_nearest_is_used(tmp_path):
    rows = [{"file_name": "z/a.png", "text": "far"}, {"file_name": "z/y/b.png", "text": "only"}]
    make_folder(tmp_path, rows, ("z/a.png", "z/y/b.png", "z/c.png"))
    near = [{"file_name": "a.png", "text": "near"}, {"file_name": "./y/../c.png", "text": "c"}]
    (tmp_path / "z" / "metadata.jsonl").write_text("\n".join(map(json.dumps, near)))
    records = scan(folder_config(tmp_path))
    assert captions_by_name(records) == {"z/a.png": (("near",),), "z/y/b.png": (("only",),), "z/c.png": (("c",),)}
    assert "duplicate" in reasons(records)["metadata.jsonl:1"]


def test_lines_of_a_sidecar_are_captions_and_fill_a_missing_text(tmp_path):
    make_folder(
        tmp_path, [{"file_name": "a.png", "style": "flat"}, {"file_name": "b.png", "text": "b", "style": "round"}]
    )
    (tmp_path / "a.txt").write_text("\ufefffirst\n\n second \n", "utf-8")
    (tmp_path / "b.txt").write_text("not this one")
    (tmp_path / "c.txt").write_text("c")
    captions = captions_by_name(scan(folder_config(tmp_path, captions=["{text}, {style}", "{text}"])))
    assert captions["a.png"] == (("first, flat", "second, flat"), ("first", "second"))
    assert captions["b.png"] == (("b, round",), ("b",))
    assert captions["c.png"] == (("c",),)  # the template with a missing column is not used


def test_where_selects_rows_by_the_values_of_columns(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "a", "tone": None, "flag": False, "words": ["x", "y"], "size": 3},
        {"file_name": "b.png", "text": "b", "tone": "dark", "flag": True, "words": ["y"], "size": 4},
        {"file_name": "c.png", "text": "c", "flag": False, "words": [], "size": 3},
    ]
    make_folder(tmp_path, rows)
    for where, kept in [
        ({"tone": [None]}, "ac"),
        ({"tone": ["dark"]}, "b"),
        ({"tone": [None, "dark"]}, "abc"),
        ({"flag": [False]}, "ac"),
        ({"words": ["x"]}, "a"),
        ({"words": [None]}, "c"),
        ({"size": [3], "tone": [None]}, "ac"),
        ({"flag": [0]}, ""),
    ]:
        if kept:
            records = scan(folder_config(tmp_path, where=where))
            assert "".join(name[0] for name in captions_by_name(records)) == kept and not records.skipped
        else:
            with pytest.raises(ValueError, match="no row matches data.where"):
                scan(folder_config(tmp_path, where=where))


def test_an_empty_folder_and_a_file_are_different_errors(tmp_path):
    with pytest.raises(ValueError, match="no usable captioned image in .*: it contains no image"):
        scan(folder_config(tmp_path))
    (tmp_path / "list.txt").write_text("a")
    with pytest.raises(NotADirectoryError, match="list.txt is a file; use its folder"):
        scan(folder_config(tmp_path / "list.txt"))


def test_misspelled_columns_are_errors_that_name_the_nearest(tmp_path):
    make_folder(tmp_path, [{"file_name": "a.png", "text": "a", "style": "x"}])
    with pytest.raises(ValueError, match="'styel'.*did you mean style"):
        scan(folder_config(tmp_path, captions=["{text}, {styel}"]))
    with pytest.raises(ValueError, match="data.where.*'colour'.*columns are file_name, style, text"):
        scan(folder_config(tmp_path, where={"colour": ["x"]}))


def test_every_damaged_row_is_skipped_with_its_reason(tmp_path):
    bad = {
        b'{"file_name": "b.png", "text"': "not JSON",
        b"[1, 2]": "not a JSON object",
        b'{"text": "no name"}': "file_name is missing",
        b'{"file_name": 3, "text": "x"}': "file_name is missing",
        b'{"file_name": "none.png", "text": "x"}': "no such file",
        b'{"file_name": "n\\u0000.png", "text": "x"}': "no such file",
        b'{"file_name": "a.png", "text": "again"}': "duplicate file_name",
        b'{"file_name": "c.png", "text": NaN}': "NaN is not JSON",
        b"[" * 100_000: "not JSON",
        b'{"file_name": "c.png", "text": "' + b"x" * (1 << 20) + b'"}': "more than 1048576 bytes",
    }
    folder = make_folder(tmp_path / "data", [{"file_name": "a.png", "text": "good"}, *bad])
    records = scan(folder_config(folder))
    assert captions_by_name(records) == {"a.png": (("good",),)}
    skipped = reasons(records)
    for line, reason in enumerate(bad.values(), 2):
        assert reason in skipped.pop(f"metadata.jsonl:{line}")
    assert set(skipped) == {"b.png", "c.png"} and all("no caption" in reason for reason in skipped.values())


@pytest.mark.parametrize("name", ["../a.png", "q/../../a.png", "/etc/passwd"])
def test_a_row_with_a_file_outside_the_folder_is_an_error_that_names_the_line(tmp_path, name):
    make_folder(tmp_path, [{"file_name": "a.png", "text": "x"}, {"file_name": name, "text": "x"}])
    with pytest.raises(ValueError, match=r"metadata.jsonl:2: file_name .* is outside the data folder"):
        scan(folder_config(tmp_path))


def test_every_row_without_a_caption_is_skipped_with_its_reason(tmp_path):
    columns = {"b": "", "c": "  ", "d": None, "g": [], "h": {"x": 1}}
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in {"a": "good", **columns}.items()]
    records = scan(folder_config(make_folder(tmp_path, rows, tuple(row["file_name"] for row in rows))))
    assert set(captions_by_name(records)) == {"a.png"}
    skipped = reasons(records)
    assert set(skipped) == {f"{name}.png" for name in columns}
    for name in "bcdgh":
        assert "missing or empty" in skipped[f"{name}.png"]


def test_every_damaged_sidecar_is_skipped_with_its_reason(tmp_path):
    make_folder(tmp_path, [], tuple(f"{name}.png" for name in "abcdef"))
    contents = {"a": b"good", "c": b" \n", "d": b"x" * (2 << 20), "e": b"\0"}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    records = scan(folder_config(tmp_path))
    assert set(captions_by_name(records)) == {"a.png"}
    skipped = reasons(records)
    assert "empty" in skipped["c.txt"] and "more than" in skipped["d.txt"]
    assert "no caption" in skipped["b.png"] and "empty" in skipped["e.png"] and "no caption" in skipped["f.png"]


def test_damaged_csv_lines_are_skipped_with_their_reason(tmp_path):
    make_folder(tmp_path, [])
    (tmp_path / "metadata.jsonl").unlink()
    huge = b"b.png," + b"x" * 200_000
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,one,two\n" + huge + b"\nc.png,good\n")
    records = scan(folder_config(tmp_path))
    assert captions_by_name(records) == {"c.png": (("good",),)}
    skipped = reasons(records)
    assert "3 cells" in skipped["metadata.csv:2"] and "not CSV" in skipped["metadata.csv:3"]


def test_empty_files_directories_and_hidden_files_never_become_records(tmp_path):
    make_folder(tmp_path, [{"file_name": name, "text": "x"} for name in ("a.png", "empty.png", "dir.png", "gone.png")])
    (tmp_path / "empty.png").touch()
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    records = scan(folder_config(tmp_path))
    assert set(captions_by_name(records)) == {"a.png"}
    skipped = reasons(records)
    assert (
        skipped["empty.png"] == "empty file"
        and skipped["dir.png"] == "a directory, not a file"
        and "gone.png" in skipped
    )
    assert ".hidden.png" not in skipped


def test_images_below_min_size_are_skipped(tmp_path):
    make_folder(tmp_path, [{"file_name": name, "text": "x"} for name in ("a.png", "b.png", "c.png")])
    Image.new("RGB", (9, 400)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    records = scan(folder_config(tmp_path, min_size=9))
    assert set(captions_by_name(records)) == {"b.png"}
    assert "min_size 9" in reasons(records)["a.png"] and "not an image" in reasons(records)["c.png"]


def test_too_many_bad_files_stop_the_run(tmp_path):
    make_folder(tmp_path, [{"file_name": "a.png", "text": "x"}])
    with pytest.raises(ValueError, match="2 of 3 entries.*max_bad_fraction 0.5.*b.png: no caption"):
        scan(folder_config(tmp_path, max_bad_fraction=0.5))
    assert len(scan(folder_config(tmp_path, max_bad_fraction=0.7)).train) == 1


def test_missing_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan(folder_config(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no usable captioned image"):
        scan(folder_config(tmp_path))


@pytest.mark.parametrize(
    "options", [{"crop": "left"}, {"image_size": 0}, {"validation": 1.0}], ids=lambda o: next(iter(o))
)
def test_errors_in_options_name_the_option(options):
    with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
        folder_config("x", **options)


def test_skipped_entries_are_written_as_json_lines(tmp_path):
    make_folder(tmp_path, [{"file_name": "a.png", "text": "x"}])
    records = scan(folder_config(tmp_path))
    write_skipped(records.skipped, str(tmp_path / "skipped.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines == [dataclasses.asdict(skip) for skip in records.skipped] and len(lines) == 2


def test_the_split_depends_on_names_only(tmp_path):
    names = tuple(f"{number}.png" for number in range(200))
    rows = [{"file_name": name, "text": name} for name in names]
    make_folder(tmp_path, rows, names)
    full = scan(folder_config(tmp_path, validation=0.2))
    held_out = {record.name for record in full.validation}
    assert 20 < len(held_out) < 60 and len(full.train) + len(held_out) == 200
    half = scan(folder_config(tmp_path, validation=0.2, where={"text": list(names[:100])}))
    assert {record.name for record in half.validation} == held_out & set(names[:100])
    more = scan(folder_config(tmp_path, validation=0.3))
    assert held_out < {record.name for record in more.validation}


def test_the_fingerprint_depends_on_names_captions_and_sizes(tmp_path):
    records = scan(folder_config(PICTURES)).train
    assert fingerprint(records) == fingerprint(scan(folder_config(PICTURES)).train)
    shutil.copytree(PICTURES, tmp_path / "copy")
    assert fingerprint(scan(folder_config(tmp_path / "copy")).train) == fingerprint(records)
    for change in ({"name": "x"}, {"captions": (("x",),)}, {"bytes": 1}):
        assert fingerprint([dataclasses.replace(records[0], **change), *records[1:]]) != fingerprint(records)


def test_an_autoencoder_needs_no_captions(tmp_path):
    make_folder(tmp_path, [], ("a.png", "sub/b.png", "c.png"))
    (tmp_path / "sub" / "b.txt").write_text("a caption")
    (tmp_path / "c.png").write_bytes(b"")
    records = scan(folder_config(tmp_path), captioned=False)
    assert list(captions_by_name(records)) == ["a.png", "sub/b.png"] and list(reasons(records)) == ["c.png"]
