"""Tar shards: every regular member is found, every damaged thing is told by name, and nothing ends without a word."""

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
from PIL import Image

from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Skip
from stipple_core.data.sources.scan import scan
from stipple_core.data.sources.tar import read_members, read_samples
from stipple_core.images.images import load_image

BLOCK = tarfile.BLOCKSIZE


def picture(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 20 % 256, number // 12, 0)).save(file, "PNG")
    return file.getvalue()


def header(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def make_tar(members: list, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, bytes) and TarInfo; the end marker is one zero block after another up to 10 KiB, as usual."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else header(member[0], size=len(member[1]))
            tar.addfile(info, None if isinstance(member, tarfile.TarInfo) else io.BytesIO(member[1]))
    return file.getvalue()


def sample(key: str, number: int = 0, text: str | None = None) -> list:
    return [(f"{key}.png", picture(number)), (f"{key}.txt", (text or key).encode())]


def read(data: bytes) -> tuple[dict[str, dict | None], dict[str, str]]:
    samples, skipped = read_samples(io.BytesIO(data), len(data))
    assert len({skip.path for skip in skipped}) == len(skipped)
    return {each.name: each.row for each in samples}, {skip.path: skip.reason for skip in skipped}


def config(place: Path, **options) -> DataConfig:
    given = {"shards": str(place / "*.tar"), "index": str(place / "index"), "image_size": 16, "validation": 0.0}
    return DataConfig(**{**given, "max_bad_fraction": 1.0, **options})


def reasons(records) -> dict[str, str]:
    return {skip.path: skip.reason for skip in records.skipped}


def test_members_are_read_at_their_offsets(tmp_path):
    pictures = {f"{number:03d}.png": picture(number) for number in range(40)}
    members = [(name, data) for name, data in pictures.items()]
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    for record in scan(config(tmp_path), captioned=False).train:
        assert record.open().read() == pictures[record.name.removeprefix("a.tar/")]


def test_columns_come_from_json_captions_from_txt_and_classes_from_cls():
    row = {"style": "flat", "meta": {"year": 1999}}
    members = [
        *sample("b", text="one\n\n two \n"),
        ("b.json", json.dumps(row).encode()),
        ("a.json", b'{"text": "from json"}'),
        ("a.txt", b"from txt"),
        ("a.JPG", picture()),
        ("d/c.webp", picture()),
        ("d/c.cls", b"7\n"),
        ("d/c.npy", b"ignored"),
        (".d/x.png/._hidden.png", b"ignored"),
        ("bare.png", picture()),
    ]
    found, skipped = read(make_tar(members))
    assert found == {
        "a.JPG": {"text": "from json"},
        "b.png": {"text": ["one", "two"], **row},
        "bare.png": None,
        "d/c.webp": {"cls": "7"},
    }
    assert list(found) == sorted(found) and not skipped


def test_columns_of_shards_feed_templates_and_where_nested_ones_too(tmp_path):
    rows = [{"text": f"t{number}", "meta": {"style": "ab"[number % 2]}} for number in range(6)]
    members = [(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(rows)]
    (tmp_path / "0.tar").write_bytes(make_tar(members + [(f"{i}.png", picture(i)) for i in range(6)]))
    records = scan(config(tmp_path, captions=["{text}, {meta.style} style"], where={"meta.style": ["b"]}))
    assert [record.captions for record in records.train] == [((f"t{i}, b style",),) for i in (1, 3, 5)]
    with pytest.raises(ValueError, match=r"'meta.stile'.*did you mean meta.style\?"):
        scan(config(tmp_path, where={"meta.stile": ["b"]}))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_in_every_format(form):
    name = "d" * (90 if form == tarfile.USTAR_FORMAT else 200) + "/" + "k" * 90 + "ü"
    found, skipped = read(make_tar(sample(name, text="long"), form))
    assert found == {f"{name}.png": {"text": ["long"]}} and not skipped


def test_whatever_is_no_regular_file_is_skipped_by_name_and_costs_nothing_else():
    sparse = header("sparse.png", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, size=BLOCK)
    bad = {
        "folder": (header("folder", type=tarfile.DIRTYPE), "a directory"),
        "soft.png": (header("soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
        "hard.png": (header("hard.png", type=tarfile.LNKTYPE, linkname="a.png"), "a hard link"),
        "null.png": (header("null.png", type=tarfile.CHRTYPE), "a device"),
        "disk.png": (header("disk.png", type=tarfile.BLKTYPE), "a device"),
        "pipe.png": (header("pipe.png", type=tarfile.FIFOTYPE), "a device"),
        "odd.png": (header("odd.png", type=b"Z"), "type b'Z'"),
        "/etc/x.png": (("/etc/x.png", picture()), "absolute"),
        "../x.png": (("../x.png", picture()), "leads out"),
        "d/../../y.png": (("d/../../y.png", picture()), "leads out"),
        "b.json": (("b.json", b'{"text"'), "not JSON"),
        "c.json": (("c.json", b"[1]"), "not a JSON object"),
        "d.txt": (("d.txt", b" \n"), "empty caption"),
        "e.txt": (("e.txt", b"x" * (2 << 20)), "more than 1048576"),
        "f.txt": (("f.txt", b"a caption"), "without a picture"),
        "g.depth.png": (("g.depth.png", picture()), "the key ends at the first dot"),
        "a.webp": (("a.webp", picture()), "second picture of the key a; a.png is used"),
    }
    members = [*sample("a"), *(member for member, _ in bad.values()), ("b.png", b"x"), ("c.png", b"x"), ("d.png", b"x")]
    members += [("e.png", b"x"), ("a.txt", b"again"), *sample("z")]
    found, skipped = read(make_tar(members))
    assert found == {
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


def test_pictures_and_captions_without_the_other_are_skipped_only_where_captions_are_wanted(tmp_path):
    members = [("a.png", picture()), ("b.txt", b"b"), *sample("c"), ("d.png", picture()), ("d.json", b"{")]
    (tmp_path / "0.tar").write_bytes(make_tar(members))
    records = scan(config(tmp_path))
    assert [record.name for record in records.train] == ["0.tar/c.png"]
    got = reasons(records)
    assert "no caption" in got["0.tar/a.png"] and "without a picture" in got["0.tar/b.txt"]
    assert "not JSON" in got["0.tar/d.json"] and "no caption" in got["0.tar/d.png"] and len(got) == 4
    records = scan(config(tmp_path), captioned=False)
    assert [record.name for record in records.train] == [f"0.tar/{key}.png" for key in "acd"] and not records.skipped


def test_a_tar_cut_anywhere_gives_what_is_whole_and_always_says_that_it_is_cut():
    whole = make_tar([member for key in "abc" for member in sample(key)], tarfile.GNU_FORMAT)
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK  # where the end marker begins
    ends = {}
    for member in read_members(io.BytesIO(whole), len(whole)):
        ends[member.name] = member.offset + member.size
    for cut in [*range(0, end + BLOCK, 100), *range(0, end + 1, BLOCK)]:
        data = whole[:cut]
        found, told = {}, []
        for member in read_members(io.BytesIO(data), len(data)):
            told.append(member) if isinstance(member, Skip) else found.setdefault(member.name, member)
        assert set(found) == {name for name, last in ends.items() if last <= cut}
        assert len(told) == (cut < end + BLOCK), cut
        if 0 < cut <= end and cut % BLOCK == 0 and not told[0].path:
            assert "no end marker" in told[0].reason
    samples, skipped = read(whole)
    assert len(samples) == 3 and not skipped


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 10240, "without members"),
        (b"no tar" * 1000, "not a tar"),
        (b"short", "not a tar"),
        (gzip.compress(make_tar(sample("a"))), "compressed.*gzip -d"),
        (zlib.compress(make_tar(sample("a"))), "not a tar"),
        (make_tar(sample("a")) + make_tar(sample("b")), "what follows the end marker at byte .* is not read"),
        (make_tar([header("a.png", size=1 << 62)], tarfile.GNU_FORMAT), "cut short"),
    ],
    ids=["empty", "zeros", "text", "short", "gz", "zlib", "two in one", "huge"],
)
def test_files_that_are_no_good_tar_are_reported_with_the_reason(tmp_path, data, reason):
    (tmp_path / "bad.tar").write_bytes(data)
    (tmp_path / "good.tar").write_bytes(make_tar(sample("z")))
    records = scan(config(tmp_path))
    assert "good.tar/z.png" in [record.name for record in records.train]
    assert len(records.skipped) == 1 and records.skipped[0].path.startswith("bad.tar")
    assert re.search(reason, records.skipped[0].reason)


class Wide(io.BytesIO):
    """Remembers the most that was asked for at once."""

    most = 0

    def read(self, size: int = -1) -> bytes:
        self.most = max(self.most, size if size >= 0 else 1 << 40)
        return super().read(min(size, 1 << 20))


def test_headers_that_lie_are_refused_before_they_are_believed():
    def lying(size: bytes, kind: bytes) -> bytes:
        """A header whose size field is `size`, with a right checksum, after a good member."""
        block = bytearray(header("a.png", type=kind).tobuf(tarfile.GNU_FORMAT))
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return make_tar([("good.png", picture())])[: 2 * BLOCK] + bytes(block) + b"\0" * 10240

    negative, huge = b"\xff" * 11 + b"\xf0", b"\x80" + b"\0" * 4 + b"\x7f" * 7
    for size in (negative, huge, b"notoctal\0\0\0\0"):
        for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
            found, skipped = read(lying(size, kind))
            assert list(found) == ["good.png"] and len(skipped) == 1, (size, kind)
    wide = Wide(lying(b"77777777777\0", tarfile.XHDTYPE))
    assert len([each for each in read_members(wide, 9 << 30) if isinstance(each, Skip)]) == 1 and wide.most == BLOCK


def test_random_damage_never_crashes_and_what_is_found_lies_inside():
    draw = random.Random(0)
    whole = make_tar([member for key in "abcdef" for member in sample(key)] + [header("l" * 300, type=tarfile.SYMTYPE)])
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(data) // BLOCK) * BLOCK + draw.randrange(300)
            data[place] = draw.randrange(256)
        samples, skipped = read_samples(io.BytesIO(bytes(data)), len(data))
        assert all(0 < each.offset <= each.offset + each.size <= len(data) for each in samples)
        assert len(samples) == 6 or skipped or all(each.row is None or each.row for each in samples)


def test_the_second_start_reads_the_index_and_not_the_shard(tmp_path, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(make_tar(sample("a") + [("b.png", picture())]))
    first = scan(config(tmp_path))
    monkeypatch.setattr(
        "stipple_core.data.sources.tar_index.read_samples", lambda *_: pytest.fail("the shard is read again")
    )
    again = scan(config(tmp_path))
    assert list(again.train) == list(first.train) and again.skipped == first.skipped
    monkeypatch.undo()
    (tmp_path / "1.tar").write_bytes(make_tar(sample("a", text="new")))
    changed = scan(config(tmp_path))
    assert [record.captions[0][0] for record in changed.train] == ["a", "new", "a"]


def test_an_index_that_is_cut_or_damaged_is_made_again_or_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(make_tar([member for key in "abc" for member in sample(key)]))
    first = list(scan(config(tmp_path)).train)
    index = next((tmp_path / "index").glob("*.jsonl"))
    whole = index.read_bytes()
    for cut in [*range(0, len(whole), 7), *range(len(whole) - 15, len(whole))]:
        index.write_bytes(whole[:cut])
        assert list(scan(config(tmp_path)).train) == first and index.read_bytes() == whole
    index.write_bytes(whole.replace(b'"offset"', b'"offsat"', 1))
    with pytest.raises(ValueError, match="damaged in line 2; delete it"):
        scan(config(tmp_path))


def test_a_shard_that_changes_while_training_is_an_error_and_no_wrong_picture(tmp_path):
    (tmp_path / "0.tar").write_bytes(make_tar([member for key in "abc" for member in sample(key)]))
    record = scan(config(tmp_path)).train[2]
    os.truncate(tmp_path / "0.tar", 100)
    with pytest.raises(ValueError, match="gave 0 of .* not what it was when indexed"):
        record.open()


def test_webdatasets_own_tars_are_read_and_so_are_ours_by_it(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pictures = {f"{number:04d}": picture(number) for number in range(20)}
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, data in pictures.items():
            writer.write({"__key__": key, "png": data, "txt": f"text {key}", "json": {"n": int(key)}, "cls": 3})
    records = scan(config(tmp_path, captions=["{text} {n} {cls}"]))
    assert not records.skipped and len(records.train) == 20
    for record in records.train:
        key = Path(record.name).stem
        assert record.open().read() == pictures[key]
        assert record.captions == ((f"text {key} {int(key)} 3",),)
    theirs = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    names = [f"0.tar/{each['__key__']}.png" for each in theirs]
    assert names == [record.name for record in records.train]


def test_a_folder_of_shards_is_found_as_such_and_a_shard_among_pictures_is_told(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.tar", "sub/a.tar"):
        (tmp_path / name).write_bytes(make_tar(sample("x")))
    (tmp_path / "c.tgz").write_bytes(gzip.compress(b"x"))
    options = {"shards": [], "folder": str(tmp_path)}
    records = scan(config(tmp_path, **options))
    assert [record.name for record in records.train] == ["b.tar/x.png", "sub/a.tar/x.png"]
    assert "compressed" in reasons(records)["c.tgz"]
    (tmp_path / "p.png").write_bytes(picture())
    (tmp_path / "p.txt").write_text("p")
    records = scan(config(tmp_path, **options))
    assert [record.name for record in records.train] == ["p.png"] and "among pictures" in reasons(records)["b.tar"]
    assert load_image(records.train[0].open()).size == (8, 8)
