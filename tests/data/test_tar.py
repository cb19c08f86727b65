"""Tar shards: every regular member is found, and every other or damaged one is reported by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import tarfile
import zlib
from pathlib import Path

import pytest

from stipple_core.data.records.records import Skip
from stipple_core.data.sources.scan import scan
from stipple_core.data.sources.tar import read_members, read_samples
from stipple_core.images.images import load_image
from tests.helpers.data.data_sources import captioned_image, make_tar, png_image, reasons, shard_config, tar_header

BLOCK = tarfile.BLOCKSIZE


def read(data: bytes) -> tuple[dict[str, dict | None], dict[str, str]]:
    samples, skipped = read_samples(io.BytesIO(data), len(data))
    assert len({skip.path for skip in skipped}) == len(skipped)
    return {each.name: each.row for each in samples}, {skip.path: skip.reason for skip in skipped}


def test_members_are_read_at_their_offsets(tmp_path):
    pictures = {f"{number:03d}.png": png_image(number) for number in range(40)}
    members = [(name, data) for name, data in pictures.items()]
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    for record in scan(shard_config(tmp_path), captioned=False).train:
        assert record.open().read() == pictures[record.name.removeprefix("a.tar/")]


def test_columns_come_from_json_captions_from_txt_and_classes_from_cls():
    row = {"style": "flat", "meta": {"year": 1999}}
    members = [
        *captioned_image("b", text="one\n\n two \n"),
        ("b.json", json.dumps(row).encode()),
        ("a.json", b'{"text": "from json"}'),
        ("a.txt", b"from txt"),
        ("a.JPG", png_image()),
        ("d/c.webp", png_image()),
        ("d/c.cls", b"7\n"),
        ("d/c.npy", b"ignored"),
        (".d/x.png/._hidden.png", b"ignored"),
        ("bare.png", png_image()),
    ]
    rows, skipped = read(make_tar(members))
    assert rows == {
        "a.JPG": {"text": "from json"},
        "b.png": {"text": ["one", "two"], **row},
        "bare.png": None,
        "d/c.webp": {"cls": "7"},
    }
    assert list(rows) == sorted(rows) and not skipped


def test_templates_and_where_use_columns_of_shards_including_nested_ones(tmp_path):
    rows = [{"text": f"t{number}", "meta": {"style": "ab"[number % 2]}} for number in range(6)]
    members = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)]
    (tmp_path / "0.tar").write_bytes(make_tar(members + [(f"{i}.png", png_image(i)) for i in range(6)]))
    records = scan(shard_config(tmp_path, captions=["{text}, {meta.style} style"], where={"meta.style": ["b"]}))
    assert [record.captions for record in records.train] == [((f"t{i}, b style",),) for i in (1, 3, 5)]
    with pytest.raises(ValueError, match=r"'meta.stile'.*did you mean meta.style\?"):
        scan(shard_config(tmp_path, where={"meta.stile": ["b"]}))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_non_ascii_names_are_read_in_every_format(form):
    name = "d" * (90 if form == tarfile.USTAR_FORMAT else 200) + "/" + "k" * 90 + "ü"
    rows, skipped = read(make_tar(captioned_image(name, text="long"), form))
    assert rows == {f"{name}.png": {"text": ["long"]}} and not skipped


def test_unusable_members_are_skipped_by_name_and_the_others_are_read():
    sparse = tar_header("sparse.png", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, size=BLOCK)
    bad = {
        "folder": (tar_header("folder", type=tarfile.DIRTYPE), "a directory"),
        "soft.png": (tar_header("soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
        "hard.png": (tar_header("hard.png", type=tarfile.LNKTYPE, linkname="a.png"), "a hard link"),
        "null.png": (tar_header("null.png", type=tarfile.CHRTYPE), "a device"),
        "disk.png": (tar_header("disk.png", type=tarfile.BLKTYPE), "a device"),
        "pipe.png": (tar_header("pipe.png", type=tarfile.FIFOTYPE), "a device"),
        "odd.png": (tar_header("odd.png", type=b"Z"), "type b'Z'"),
        "/etc/x.png": (("/etc/x.png", png_image()), "absolute"),
        "../x.png": (("../x.png", png_image()), "outside the tar"),
        "d/../../y.png": (("d/../../y.png", png_image()), "outside the tar"),
        "b.json": (("b.json", b'{"text"'), "not JSON"),
        "c.json": (("c.json", b"[1]"), "not a JSON object"),
        "d.txt": (("d.txt", b" \n"), "empty caption"),
        "e.txt": (("e.txt", b"x" * (2 << 20)), "more than 1048576"),
        "f.txt": (("f.txt", b"a caption"), "without an image"),
        "g.depth.png": (("g.depth.png", png_image()), "the key ends at the first dot"),
        "a.webp": (("a.webp", png_image()), "second image of the key a; a.png is used"),
    }
    members = [
        *captioned_image("a"),
        *(member for member, _ in bad.values()),
        ("b.png", b"x"),
        ("c.png", b"x"),
        ("d.png", b"x"),
    ]
    members += [("e.png", b"x"), ("a.txt", b"again"), *captioned_image("z")]
    rows, skipped = read(make_tar(members))
    assert rows == {
        "a.png": {"text": ["a"]},
        **dict.fromkeys(["b.png", "c.png", "d.png", "e.png"]),
        "z.png": {"text": ["z"]},
    }
    assert "duplicate member a.txt; its first is used" in skipped.pop("a.txt")
    for name, (_, reason) in bad.items():
        assert reason in skipped.pop(name)
    assert not skipped
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(b"1\n0\n512\n".ljust(BLOCK, b"\0")))
    _, skipped = read(data.getvalue())
    assert list(skipped.values()) == ["a sparse member, not a plain file"]


def test_images_without_captions_are_skipped_only_if_captions_are_required(tmp_path):
    members = [("a.png", png_image()), ("b.txt", b"b"), *captioned_image("c"), ("d.png", png_image()), ("d.json", b"{")]
    (tmp_path / "0.tar").write_bytes(make_tar(members))
    records = scan(shard_config(tmp_path))
    assert [record.name for record in records.train] == ["0.tar/c.png"]
    skipped = reasons(records)
    assert "no caption" in skipped["0.tar/a.png"] and "without an image" in skipped["0.tar/b.txt"]
    assert "not JSON" in skipped["0.tar/d.json"] and "no caption" in skipped["0.tar/d.png"] and len(skipped) == 4
    records = scan(shard_config(tmp_path), captioned=False)
    assert [record.name for record in records.train] == [f"0.tar/{key}.png" for key in "acd"] and not records.skipped


def test_a_tar_truncated_anywhere_gives_its_complete_members_and_one_skip():
    whole = make_tar([member for key in "abc" for member in captioned_image(key)], tarfile.GNU_FORMAT)
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK  # the offset of the end marker
    ends = {}
    for member in read_members(io.BytesIO(whole), len(whole)):
        ends[member.name] = member.offset + member.size
    for cut in [*range(0, end + BLOCK, 100), *range(0, end + 1, BLOCK)]:
        data = whole[:cut]
        found, skips = {}, []
        for member in read_members(io.BytesIO(data), len(data)):
            skips.append(member) if isinstance(member, Skip) else found.setdefault(member.name, member)
        assert set(found) == {name for name, last in ends.items() if last <= cut}
        assert len(skips) == (cut < end + BLOCK), cut
        if 0 < cut <= end and cut % BLOCK == 0 and not skips[0].path:
            assert "no end marker" in skips[0].reason
    samples, skipped = read(whole)
    assert len(samples) == 3 and not skipped


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 10240, "without members"),
        (b"no tar" * 1000, "not a tar"),
        (b"short", "not a tar"),
        (gzip.compress(make_tar(captioned_image("a"))), "compressed.*gzip -d"),
        (zlib.compress(make_tar(captioned_image("a"))), "not a tar"),
        (
            make_tar(captioned_image("a")) + make_tar(captioned_image("b")),
            "data after the end marker at byte .* are not read",
        ),
        (make_tar([tar_header("a.png", size=1 << 62)], tarfile.GNU_FORMAT), "cut short"),
    ],
    ids=["empty", "zeros", "text", "short", "gz", "zlib", "two in one", "huge"],
)
def test_files_that_are_not_valid_tars_are_reported_with_the_reason(tmp_path, data, reason):
    (tmp_path / "bad.tar").write_bytes(data)
    (tmp_path / "good.tar").write_bytes(make_tar(captioned_image("z")))
    records = scan(shard_config(tmp_path))
    assert "good.tar/z.png" in [record.name for record in records.train]
    assert len(records.skipped) == 1 and records.skipped[0].path.startswith("bad.tar")
    assert re.search(reason, records.skipped[0].reason)


class LargestRead(io.BytesIO):
    """A file that records the size of its largest read."""

    largest = 0

    def read(self, size: int = -1) -> bytes:
        self.largest = max(self.largest, size if size >= 0 else 1 << 40)
        return super().read(min(size, 1 << 20))


def test_headers_with_invalid_sizes_are_not_read():
    def with_size(size: bytes, kind: bytes) -> bytes:
        """A tar of a good member and a header whose size field is `size`, with a valid checksum."""
        block = bytearray(tar_header("a.png", type=kind).tobuf(tarfile.GNU_FORMAT))
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return make_tar([("good.png", png_image())])[: 2 * BLOCK] + bytes(block) + b"\0" * 10240

    negative, huge = b"\xff" * 11 + b"\xf0", b"\x80" + b"\0" * 4 + b"\x7f" * 7
    for size in (negative, huge, b"notoctal\0\0\0\0"):
        for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
            rows, skipped = read(with_size(size, kind))
            assert list(rows) == ["good.png"] and len(skipped) == 1, (size, kind)
    file = LargestRead(with_size(b"77777777777\0", tarfile.XHDTYPE))
    assert len([each for each in read_members(file, 9 << 30) if isinstance(each, Skip)]) == 1 and file.largest == BLOCK


def test_random_damage_raises_no_error_and_all_members_lie_inside_the_tar():
    draw = random.Random(0)
    whole = make_tar(
        [member for key in "abcdef" for member in captioned_image(key)] + [tar_header("l" * 300, type=tarfile.SYMTYPE)]
    )
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(data) // BLOCK) * BLOCK + draw.randrange(300)
            data[place] = draw.randrange(256)
        samples, skipped = read_samples(io.BytesIO(bytes(data)), len(data))
        assert all(0 < each.offset <= each.offset + each.size <= len(data) for each in samples)
        assert len(samples) == 6 or skipped or all(each.row is None or each.row for each in samples)


def test_a_second_scan_reads_the_index_instead_of_the_shard(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(make_tar(captioned_image("a") + [("b.png", png_image())]))
    first = scan(shard_config(tmp_path))
    monkeypatch.setattr(
        "stipple_core.data.sources.tar_index.read_samples", lambda *_: pytest.fail("the shard is read again")
    )
    again = scan(shard_config(tmp_path))
    assert list(again.train) == list(first.train) and again.skipped == first.skipped
    monkeypatch.undo()
    (tmp_path / "1.tar").write_bytes(make_tar(captioned_image("a", text="new")))
    changed = scan(shard_config(tmp_path))
    assert [record.captions[0][0] for record in changed.train] == ["a", "new", "a"]


def test_a_truncated_index_is_written_again_and_a_damaged_one_is_an_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(make_tar([member for key in "abc" for member in captioned_image(key)]))
    first = list(scan(shard_config(tmp_path)).train)
    index = next((tmp_path / "index").glob("*.jsonl"))
    whole = index.read_bytes()
    for cut in [*range(0, len(whole), 7), *range(len(whole) - 15, len(whole))]:
        index.write_bytes(whole[:cut])
        assert list(scan(shard_config(tmp_path)).train) == first and index.read_bytes() == whole
    index.write_bytes(whole.replace(b'"offset"', b'"offsat"', 1))
    with pytest.raises(ValueError, match="damaged in line 2; delete it"):
        scan(shard_config(tmp_path))


def test_a_shard_that_changes_during_training_is_an_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(make_tar([member for key in "abc" for member in captioned_image(key)]))
    record = scan(shard_config(tmp_path)).train[2]
    os.truncate(tmp_path / "0.tar", 100)
    with pytest.raises(ValueError, match="has 0 of .* it changed after it was indexed"):
        record.open()


def test_tars_of_webdataset_are_read_as_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pictures = {f"{number:04d}": png_image(number) for number in range(20)}
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, data in pictures.items():
            writer.write({"__key__": key, "png": data, "txt": f"text {key}", "json": {"n": int(key)}, "cls": 3})
    records = scan(shard_config(tmp_path, captions=["{text} {n} {cls}"]))
    assert not records.skipped and len(records.train) == 20
    for record in records.train:
        key = Path(record.name).stem
        assert record.open().read() == pictures[key]
        assert record.captions == ((f"text {key} {int(key)} 3",),)
    expected = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    names = [f"0.tar/{each['__key__']}.png" for each in expected]
    assert names == [record.name for record in records.train]


def test_a_folder_of_shards_is_read_and_a_shard_among_images_is_skipped(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.tar", "sub/a.tar"):
        (tmp_path / name).write_bytes(make_tar(captioned_image("x")))
    (tmp_path / "c.tgz").write_bytes(gzip.compress(b"x"))
    options = {"shards": [], "folder": str(tmp_path)}
    records = scan(shard_config(tmp_path, **options))
    assert [record.name for record in records.train] == ["b.tar/x.png", "sub/a.tar/x.png"]
    assert "compressed" in reasons(records)["c.tgz"]
    (tmp_path / "p.png").write_bytes(png_image())
    (tmp_path / "p.txt").write_text("p")
    records = scan(shard_config(tmp_path, **options))
    assert [record.name for record in records.train] == ["p.png"] and "in a folder of images" in reasons(records)[
        "b.tar"
    ]
    assert load_image(records.train[0].open()).size == (8, 8)
