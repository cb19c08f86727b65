"""Parquet files and Hugging Face datasets: they give the same records as other sources."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.sources.scan import scan
from stipple_core.images.images import UnusableImage, load_image
from tests.helpers.data.data_sources import png_image, reasons, shard_config

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[2]


def config(place: Path, **options) -> DataConfig:
    return shard_config(place, **{"shards": str(place / "*.parquet"), **options})


def as_struct(data: bytes) -> dict:
    return {"bytes": data, "path": None}


def rows(count: int, form=bytes) -> list[dict]:
    return [
        {"picture": form(png_image(i)), "text": f"t{i}", "tags": ["x", f"y{i}"], "meta": {"style": "ab"[i % 2]}}
        for i in range(count)
    ]


def write(path: Path, table: list[dict], **options) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(table), path, **options)


@pytest.mark.parametrize(
    "form", [lambda data: data, lambda data: {"bytes": data, "path": None}], ids=["bytes", "struct"]
)
def test_each_row_is_a_record_with_captions_from_its_columns(tmp_path, form):
    write(tmp_path / "b.parquet", rows(5, form), row_group_size=2)
    write(tmp_path / "a.parquet", rows(3, form))
    templates = ["{text}, {meta.style}", "{tags}"]
    records = scan(config(tmp_path, captions=templates)).train
    assert [r.name for r in records] == [f"a.parquet:{i}" for i in range(3)] + [f"b.parquet:{i}" for i in range(5)]
    for number, record in zip([*range(3), *range(5)], records, strict=True):
        assert record.open().read() == png_image(number) and record.bytes == len(png_image(number))
        assert record.captions == ((f"t{number}, {'ab'[number % 2]}",), ("x", f"y{number}"))
    kept = scan(config(tmp_path, where={"meta.style": ["b"], "tags": ["y1", "y3"]})).train
    assert [record.name for record in kept] == ["a.parquet:1", "b.parquet:1", "b.parquet:3"]
    assert list(scan(config(tmp_path, shards=[], folder=str(tmp_path), captions=templates)).train) == list(records)


def test_rows_are_unpacked_once_and_again_when_the_file_changes(tmp_path):
    write(tmp_path / "a.parquet", rows(3))
    scan(config(tmp_path))
    unpacked = next((tmp_path / "index").glob("*.arrow"))
    before = unpacked.stat().st_mtime_ns, unpacked.stat().st_ino
    scan(config(tmp_path))
    assert (unpacked.stat().st_mtime_ns, unpacked.stat().st_ino) == before
    os.truncate(unpacked, unpacked.stat().st_size // 2)  # truncated by a full disk
    from stipple_core.data.sources.image_tables import _map

    _map.cache_clear()  # as in another process
    assert scan(config(tmp_path)).train[2].open().read() == png_image(2)
    write(tmp_path / "a.parquet", rows(4))
    assert len(scan(config(tmp_path)).train) == 4


def test_bad_rows_and_files_are_skipped_by_name(tmp_path):
    table = rows(6, as_struct)
    table[0]["picture"] = None
    table[1]["picture"] = {"bytes": None, "path": None}
    table[2]["picture"] = {"bytes": None, "path": "gone.png"}
    table[3]["picture"] = {"bytes": b"", "path": None}
    table[4]["text"] = None
    write(tmp_path / "a.parquet", table)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "middle.parquet").write_bytes(whole[:100] + bytes(400) + whole[500:])
    names = ["a", "cut", "empty", "middle", "gone"]
    records = scan(config(tmp_path, shards=[str(tmp_path / f"{name}.parquet") for name in names]))
    assert [record.name for record in records.train][:1] == ["a.parquet:5"]
    skipped = reasons(records)
    assert [skipped[f"a.parquet:{row}"].split(":")[0] for row in range(5)] == [
        "no image in this row", "no image in this row", "no image in this row", "empty file", "no caption",
    ]  # fmt: skip
    assert "not a readable parquet file" in skipped["cut.parquet"] and "not a readable" in skipped["empty.parquet"]
    assert "not a readable" in skipped["middle.parquet"] and skipped["gone.parquet"] == "no such file"
    assert len(scan(config(tmp_path, shards=str(tmp_path / "a.parquet")), captioned=False).train) == 2


def test_the_column_of_images_is_found_or_requested(tmp_path):
    table = [{"left": png_image(1), "right": png_image(2), "text": "x"}]
    write(tmp_path / "a.parquet", table)
    with pytest.raises(ValueError, match="left, right could all contain the images; choose one by data.image_column"):
        scan(config(tmp_path))
    assert scan(config(tmp_path, image_column="right")).train[0].open().read() == png_image(2)
    with pytest.raises(ValueError, match="data.image_column text of .* does not contain images; use left or right"):
        scan(config(tmp_path, image_column="text"))
    write(tmp_path / "a.parquet", [{"text": "x"}])
    with pytest.raises(ValueError, match="none of the columns text contains images"):
        scan(config(tmp_path))


def test_saved_datasets_and_their_parquet_files_give_the_same_records(tmp_path):
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["cat", "dog"])
    table = {"image": [{"bytes": png_image(i), "path": None} for i in range(7)], "label": [i % 2 for i in range(7)]}
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    saved = datasets.Dataset.from_dict(table, features=features)
    saved.to_parquet(str(tmp_path / "a.parquet"))
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved.select([0]), "test": saved}).save_to_disk(str(tmp_path / "dict"))
    captions = ["a photo of a {label}"]
    sources = {
        "parquet": config(tmp_path, captions=captions),
        "saved": config(tmp_path, shards=[], dataset=str(tmp_path / "saved"), captions=captions),
        "dict": config(tmp_path, shards=[], dataset=str(tmp_path / "dict"), split="test", captions=captions),
    }
    for name, options in sources.items():
        records = scan(options).train
        assert [record.captions[0][0] for record in records] == [
            f"a photo of a {['cat', 'dog'][i % 2]}" for i in range(7)
        ]
        assert [record.open().read() for record in records] == [png_image(i) for i in range(7)], name
        assert [record.bytes for record in records] == [len(png_image(i)) for i in range(7)]
    assert [r.name for r in scan(sources["saved"]).train] == [f"saved:{i}" for i in range(7)]
    with pytest.raises(ValueError, match=r"no split validation; use data.split=train or test"):
        scan(config(tmp_path, shards=[], dataset=str(tmp_path / "dict"), split="validation", captions=captions))


def test_a_cell_with_a_path_is_read_from_the_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "x.png").write_bytes(png_image(3))
    saved = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.png")], "text": ["x"]})
    saved = saved.cast_column("image", datasets.Image())
    saved.save_to_disk(str(tmp_path / "saved"))
    record = scan(config(tmp_path, shards=[], dataset=str(tmp_path / "saved"))).train[0]
    assert load_image(record.open()).size == (8, 8) and record.bytes == len(png_image(3))


def test_pickled_records_of_tables_can_be_opened_in_another_process(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "a.parquet", rows(3))
    datasets.Dataset.from_list(rows(3)).save_to_disk(str(tmp_path / "saved"))
    records = [scan(config(tmp_path)).train[2]]
    records.append(scan(config(tmp_path, shards=[], dataset=str(tmp_path / "saved"))).train[2])
    code = (
        "import pickle, sys; print([r.open().read().hex() for r in pickle.load(sys.stdin.buffer)] == [sys.argv[1]] * 2)"
    )
    command = [sys.executable, "-c", code, png_image(2).hex()]
    done = subprocess.run(command, input=pickle.dumps(records), cwd=ROOT, capture_output=True)
    assert done.stdout == b"True\n", done.stderr


def test_a_missing_dataset_is_an_error_of_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "nothing").mkdir()
    for name in ("nobody/nothing-at-all", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match="data.dataset .* can't be opened") as raised:
            scan(config(tmp_path, shards=[], dataset=name))
        assert "\n" not in str(raised.value)


def test_the_error_for_a_missing_package_has_the_command_that_installs_it(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", rows(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'stipple\[datasets\]'"):
        scan(config(tmp_path))


def test_an_empty_cell_is_an_unusable_image(tmp_path):
    from stipple_core.data.sources.image_tables import ArrowFile

    write(tmp_path / "a.parquet", [{"picture": None, "text": "x"}, *rows(1)])
    record = scan(config(tmp_path)).train[0]
    assert isinstance(record.source, ArrowFile)
    with pytest.raises(UnusableImage, match="no image"):
        record.source.open(0, 1)
    assert json.loads(json.dumps(record.captions)) == [["t0"]]


def test_a_failed_unpacking_leaves_no_temporary_file(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", rows(3))

    class Full(pyarrow.ipc.RecordBatchStreamWriter):
        def write_batch(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pyarrow.ipc, "new_stream", Full)
    with pytest.raises(OSError, match="No space left"):
        scan(config(tmp_path))
    assert not list((tmp_path / "index").glob("*.tmp*")) and not list((tmp_path / "index").glob("*.arrow"))


def test_the_state_of_a_saved_dataset_changes_with_its_contents(tmp_path):
    datasets = pytest.importorskip("datasets")
    states = []
    for count in (3, 4):
        datasets.Dataset.from_list(rows(count)).save_to_disk(str(tmp_path / "saved"))
        from stipple_core.data.sources.image_tables import _open_dataset

        _open_dataset.cache_clear()  # as in another process
        records = scan(config(tmp_path, shards=[], dataset=str(tmp_path / "saved"))).train
        states.append(records[0].source.state())
        assert records[0].source.state() == states[-1]
    assert states[0] != states[1]
