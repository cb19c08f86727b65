"""The data check: unusable images are found before training, results are cached, and processes share the work."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

import stipple_core.data.verify
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import (
    Record,
    Records,
    Skip,
    SkipLog,
    merge_skipped,
    read_skipped,
    totals,
    write_skipped,
)
from stipple_core.data.sources.scan import scan
from stipple_core.data.verify import Inspection, InspectionCache, drop_unusable, inspect
from stipple_core.images.images import UnusableImage, load_image


def folder_of(tmp_path: Path, count: int = 12) -> Path:
    """Images of increasing width; 3 and 7 are damaged."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (number + 1, 8)).save(folder / f"{number:02}.png")
    (folder / "03.png").write_bytes(b"no image")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:45])
    return folder


def scanned(folder: Path, **options) -> tuple[DataConfig, Records]:
    config = DataConfig(folder=str(folder), image_size=16, validation=0.0, **options)
    return config, scan(config, captioned=False)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the images that were decoded."""
    names = []

    def decode(record):
        names.append(record.name)
        return original(record)

    original = stipple_core.data.verify._decode
    monkeypatch.setattr(stipple_core.data.verify, "_decode", decode)
    return names


def test_undecodable_images_are_removed_with_their_reason(tmp_path):
    config, records = scanned(folder_of(tmp_path))
    inspections = inspect(records.train, InspectionCache(str(tmp_path / "run")))
    assert [each.width for each in inspections] == [1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11, 12]
    assert "known format" in inspections[3].reason and "can't be decoded" in inspections[7].reason
    remaining = drop_unusable(records, inspections, [], config)
    assert [record.name for record in remaining.train] == [f"{n:02}.png" for n in range(12) if n not in (3, 7)]
    assert remaining.skipped == [Skip("03.png", inspections[3].reason), Skip("07.png", inspections[7].reason)]


def test_the_shares_of_all_processes_are_the_whole_result(tmp_path):
    _, records = scanned(folder_of(tmp_path))
    whole = inspect(records.train, InspectionCache(str(tmp_path / "run")))
    for world in (2, 3, 5, 20):
        shares = [
            inspect(records.train, InspectionCache(str(tmp_path / str(world)), r), (r, world)) for r in range(world)
        ]
        assert [shares[i % world][i // world] for i in range(12)] == whole


def test_checked_images_are_not_decoded_again_until_they_change(tmp_path, decoded):
    folder = folder_of(tmp_path)
    _, records = scanned(folder)
    caches = [InspectionCache(str(tmp_path / "run"), rank) for rank in (0, 1)]
    for rank in (0, 1):  # written by two processes, read by one
        inspect(records.train, caches[rank], (rank, 2))
        caches[rank].flush()
    assert sorted(decoded) == [record.name for record in records.train]
    decoded.clear()
    inspections = inspect(records.train, InspectionCache(str(tmp_path / "run")))
    assert not decoded and inspections[4] == Inspection(5, 8) and inspections[3].reason and inspections[7].reason
    Image.new("RGB", (30, 8)).save(folder / "03.png")  # another size
    stat = os.stat(folder / "05.png")
    os.utime(folder / "05.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # another time
    again = inspect(scanned(folder)[1].train, InspectionCache(str(tmp_path / "run")))
    assert decoded == ["03.png", "05.png"] and again[3] == Inspection(30, 8)


def test_incomplete_lines_of_a_killed_run_are_ignored(tmp_path, decoded):
    _, records = scanned(folder_of(tmp_path))
    cache = InspectionCache(str(tmp_path))
    inspect(records.train, cache)
    cache.flush()
    path = tmp_path / "verified-0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    decoded.clear()
    cache = InspectionCache(str(tmp_path))
    inspect(records.train, cache)
    cache.flush()
    assert decoded == ["11.png"]
    decoded.clear()
    path.write_bytes(path.read_bytes() + b'null\n[1]\n{"name": 3}\n\xff\n{"name": "x", "bytes": "y", "modified": 1}\n')
    inspect(records.train, InspectionCache(str(tmp_path)))
    assert not decoded


def test_only_a_long_check_writes_results_before_the_run_begins(tmp_path, monkeypatch):
    _, records = scanned(folder_of(tmp_path))
    inspect(records.train, InspectionCache(str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(stipple_core.data.verify, "WRITE_EVERY", -1)
    monkeypatch.setattr(stipple_core.data.verify, "CHUNK", 5)
    inspect(records.train, InspectionCache(str(tmp_path / "run")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "verified-0.jsonl").read_text().split("\n") if line]
    assert [line["name"] for line in lines] == [record.name for record in records.train]


def test_too_many_unusable_images_are_an_error(tmp_path):
    config, records = scanned(folder_of(tmp_path), max_bad_fraction=0.1)
    inspections = inspect(records.train, InspectionCache(str(tmp_path / "run")))
    with pytest.raises(ValueError, match="2 of 12 entries .* more than data.max_bad_fraction 0.1: 03.png: not an im"):
        drop_unusable(records, inspections, [], config)
    drop_unusable(records, inspections, [], dataclasses.replace(config, max_bad_fraction=0.17))


def test_totals_count_kinds_of_reasons_and_skips_are_read_without_duplicates(tmp_path):
    skips = [Skip("a", "empty file"), Skip("b", "too small: 3 x 4"), Skip("c", "too small: 5 x 1"), Skip("\udcff", "x")]
    assert totals(skips) == "2 too small, 1 empty file, 1 x" and totals([]) == ""
    assert totals([Skip("a", "compressed; give 'pipe:gunzip < SHARD', or unpack it")]) == "1 compressed"
    write_skipped([*skips, skips[1]], str(tmp_path / "skipped.jsonl"))
    assert read_skipped(str(tmp_path / "skipped.jsonl")) == skips


def checked(records, run: Path) -> list[Inspection]:
    """The inspections of a run, which are written to its cache."""
    cache = InspectionCache(str(run))
    inspections = inspect(records, cache)
    cache.flush()
    return inspections


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM])
def test_a_system_error_names_the_file_and_is_not_cached(tmp_path, monkeypatch, number):
    _, records = scanned(folder_of(tmp_path))

    def fail(source, *_):
        if source.endswith("05.png"):
            raise OSError(number, os.strerror(number))
        return load_image(source)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(number)) as raised:
        patch.setattr(stipple_core.data.verify, "load_image", fail)
        cache = InspectionCache(str(tmp_path / "run"))
        inspect(records.train, cache)
    assert raised.value.filename == str(tmp_path / "data" / "05.png")
    cache.flush()
    assert checked(records.train, tmp_path / "run")[5] == Inspection(6, 8)


def test_an_image_is_checked_again_if_the_codec_was_out_of_memory(tmp_path, monkeypatch):
    _, records = scanned(folder_of(tmp_path))

    def fail(_):
        raise UnusableImage("can't be decoded: OSError: out of memory error when reading image file")

    with monkeypatch.context() as patch:
        patch.setattr(stipple_core.data.verify, "load_image", fail)
        assert checked(records.train, tmp_path / "run")[5].reason
    assert checked(records.train, tmp_path / "run")[5] == Inspection(6, 8)


def test_an_image_is_checked_again_if_only_its_permissions_change(tmp_path, decoded):
    folder = folder_of(tmp_path)
    _, records = scanned(folder)
    checked(records.train, tmp_path / "run")
    decoded.clear()
    time.sleep(0.02)  # file systems have coarse clocks
    (folder / "04.png").chmod(0o640)
    checked(records.train, tmp_path / "run")
    assert decoded == ["04.png"]


def test_an_image_that_is_replaced_while_it_is_checked_is_checked_again(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    size = (folder / "04.png").stat().st_size
    _, records = scanned(folder)

    def replace(source, *_):
        image = load_image(source)
        if source.endswith("04.png"):
            time.sleep(0.02)
            (folder / "04.png").write_bytes(b"x" * size)
        return image

    with monkeypatch.context() as patch:
        patch.setattr(stipple_core.data.verify, "load_image", replace)
        assert checked(records.train, tmp_path / "run")[4] == Inspection(5, 8)
    assert checked(records.train, tmp_path / "run")[4].reason


@dataclasses.dataclass(frozen=True)
class Remote:
    """A shard behind a URL whose server sends an etag."""

    path: str = "https://x/0.tar"
    etag = ["a"]
    data = [b"no image"]
    requests: ClassVar[list] = []

    def open(self, place: int, size: int) -> io.BytesIO:
        return io.BytesIO(self.data[0])

    def state(self) -> dict:
        self.requests.append(self.path)
        return {"bytes": 10240, "etag": self.etag[0]}


def test_a_shard_that_was_uploaded_again_is_checked_again_with_one_request(tmp_path, decoded):
    source, good = Remote(), io.BytesIO()
    Image.new("RGB", (5, 8)).save(good, "PNG")
    records = [Record(source.path, f"0.tar/{number}.png", (), 9, source, 512 * number) for number in range(3)]
    assert all(each.reason for each in checked(records, tmp_path)) and len(source.requests) == 1
    source.data[0] = good.getvalue()  # of the same size in the index
    assert all(each.reason for each in checked(records, tmp_path)) and len(decoded) == 3
    source.etag[0] = "b"
    assert checked(records, tmp_path) == [Inspection(5, 8)] * 3
    decoded.clear()
    elsewhere = Remote("https://y/0.tar")
    checked([dataclasses.replace(record, path=elsewhere.path, source=elsewhere) for record in records], tmp_path)
    assert len(decoded) == 3


def test_merging_keeps_skipped_entries_of_earlier_runs(tmp_path):
    path = str(tmp_path / "skipped.jsonl")
    merge_skipped([Skip("a", "x")], path)
    with open(path, "ab") as file:
        file.write(b'{"path": "b", "reason": "late"}\n{"path": "c", "rea')  # killed
    log = SkipLog(path)
    assert log.append(Skip("d", "later")) == 3 and log.append(Skip("b", "again")) == 3
    merge_skipped([Skip("a", "y"), Skip("e", "z")], path)
    assert read_skipped(path) == [Skip("a", "y"), Skip("e", "z"), Skip("b", "late"), Skip("d", "later")]
    assert SkipLog(path).append(Skip("f", "z")) == 5 and os.listdir(tmp_path) == ["skipped.jsonl"]
    write_skipped([], path)
    assert log.append(Skip("a", "x")) == 1


def test_an_append_waits_for_another_process_and_reads_its_entry(tmp_path):
    path = tmp_path / "skipped.jsonl"
    log = SkipLog(str(path))
    with ThreadPoolExecutor(1) as pool, open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        mine = pool.submit(log.append, Skip("a", "x"))
        time.sleep(0.1)
        assert not mine.done() and not path.read_text()
        file.write('{"path": "a", "reason": "x"}\n')
        file.close()
        assert mine.result(10) == 1 and read_skipped(str(path)) == [Skip("a", "x")]
