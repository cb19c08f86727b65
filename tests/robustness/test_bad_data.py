"""Bad files among good ones: training equals training on the good ones, bit for bit, and each bad one is reported."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stipple_core.images.images import UnusableImage
from tests.helpers.data.image_files import encoded, png_file
from tests.helpers.training.tiny_runs import STAGE_1, STAGE_2, files, final_state, launch, run_here

RNG = np.random.default_rng(0)
pytestmark = pytest.mark.usefixtures("settings_of_runs")


def drawing(side: int = 32) -> Image.Image:
    """A small random image."""
    colors = RNG.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC)


def truncated(form: str, **options) -> Callable[[], bytes]:
    """Returns the first two thirds of a file."""

    def make() -> bytes:
        data = encoded(drawing(64), form, **options).getvalue()
        return data[: len(data) * 2 // 3]

    return make


def broken_pixels(form: str, **options) -> Callable[[], bytes]:
    """Returns a file whose middle third is noise."""

    def make() -> bytes:
        data = encoded(drawing(64), form, **options).getvalue()
        start, noise = len(data) // 3, RNG.bytes(len(data) // 3)
        return data[:start] + noise + data[start + len(noise) :]

    return make


def directory() -> None:
    """Stands for a folder with the name of an image."""


# by kind: makes the contents of a file; the beginning of the reason
BAD: dict[str, tuple[Callable[[], bytes | None], str]] = {
    "zero-byte": (lambda: b"", "empty file"),
    "directory": (directory, "a directory, not a file"),
    "text": (lambda: b"not an image\n", "not an image of a known format"),
    "html": (lambda: b"<!DOCTYPE html><title>404 Not Found</title>", "not an image of a known format"),
    "svg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "not an image of a known format",
    ),
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + RNG.bytes(500), "not an image of a known format"),
    "avif": (lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + RNG.bytes(500), "not an image of a known format"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    "pdf": (lambda: b"%PDF-1.7\n%%EOF\n", "not an image of a known format"),
    "video": (lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + RNG.bytes(500), "not an image of a known format"),
    "noise": (lambda: RNG.bytes(700), "not an image of a known format"),
    "zeros": (lambda: b"\0" * 700, "not an image of a known format"),
    "truncated png": (truncated("PNG"), "can't be decoded"),
    "truncated jpeg": (truncated("JPEG", quality=95), "can't be decoded"),
    "truncated webp": (truncated("WEBP"), "can't be decoded"),
    "truncated gif": (truncated("GIF"), "can't be decoded"),
    "truncated bmp": (truncated("BMP"), "can't be decoded"),
    "truncated tiff": (truncated("TIFF"), "can't be decoded"),
    "broken png": (broken_pixels("PNG"), "can't be decoded"),
    "header only": (lambda: encoded(drawing()).getvalue()[:33], "not an image of a known format"),
    "bomb": (lambda: png_file(60_000, 60_000, 8, 0, b"").getvalue(), "too many pixels"),
    "large": (lambda: png_file(8_000, 7_000, 8, 0, b"").getvalue(), "too many pixels"),
    "float": (lambda: encoded(Image.new("F", (32, 32), 0.5), "TIFF").getvalue(), "pixels have no defined range"),
    "no pixels": (lambda: png_file(0, 9, 8, 2, b"").getvalue(), "not an image of a known format"),
    "too small": (lambda: encoded(drawing(7)).getvalue(), "too small"),
    "too narrow": (lambda: encoded(drawing().resize((16, 90))).getvalue(), "too narrow"),
    "wrong checksum": (lambda: wrong_checksum(encoded(drawing()).getvalue()), "not an image of a known format"),
}
OPTIONS = ["data.min_size=8", "data.max_aspect=4", "data.image_size=32", "data.validation=0.05", "validation.every=0"]


def wrong_checksum(data: bytes) -> bytes:
    """A PNG whose header does not have the right checksum."""
    return data[:16] + struct.pack(">I", 33) + data[20:]


def make_good(folder: Path, count: int) -> None:
    """Write captioned images in two formats and a subfolder."""
    (folder / "sub").mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as file:
        for number in range(count):
            name = f"{'sub/' * (number % 3 == 0)}{number * 7919 % 100_003:06}.{'webp' if number % 2 else 'png'}"
            data = encoded(drawing(), "WEBP" if number % 2 else "PNG").getvalue()
            (folder / name).write_bytes(data)
            file.write(json.dumps({"file_name": name, "text": f"drawing {number}"}) + "\n")


def add_bad(folder: Path, count: int) -> dict[str, str]:
    """Write captioned files of every bad kind; return the beginnings of their reasons by name."""
    expected, kinds = {}, list(BAD)
    with open(folder / "metadata.jsonl", "a") as file:
        for number in range(count):
            kind = kinds[number % len(kinds)]
            make, reason = BAD[kind]
            name = f"{'sub/' * (number % 2)}{number * 104_729 % 99_991:06}x.{('png', 'jpg', 'tif')[number % 3]}"
            contents = make()
            (folder / name).mkdir() if contents is None else (folder / name).write_bytes(contents)
            file.write(json.dumps({"file_name": name, "text": f"a {kind}"}) + "\n")
            expected[name] = reason
    return expected


def skips(run: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row["reason"] for row in rows}


def prove(tmp_path: Path, good: int, bad: int, steps: int, capsys) -> None:
    """Assert that both stages end with the same bits with and without bad files."""
    clean, mixed = tmp_path / "clean", tmp_path / "mixed"
    make_good(clean, good)
    for name, data in files(clean).items():
        (mixed / name).parent.mkdir(parents=True, exist_ok=True)
        (mixed / name).write_bytes(data)
    expected = add_bad(mixed, bad)
    kinds = Counter(expected.values())
    length = [f"trainer.steps={steps}", "samples.every=0"]
    for stage, more in ((STAGE_1, length[:1]), (STAGE_2, [*length, f"autoencoder={tmp_path}/ae-clean/model"])):
        name = "ae" if stage is STAGE_1 else "ldm"
        runs = {folder: tmp_path / f"{name}-{folder.name}" for folder in (clean, mixed)}
        for folder, run in runs.items():
            capsys.readouterr()
            run_here(*stage, f"data.folder={folder}", f"run={run}", *OPTIONS, *more)
        output = capsys.readouterr().out
        assert final_state(runs[clean]) == final_state(runs[mixed])
        assert files(runs[clean] / "model") == files(runs[mixed] / "model")
        reported = skips(runs[mixed])
        assert set(reported) == set(expected) and not skips(runs[clean])
        for file, reason in expected.items():
            assert reported[file].startswith(reason), (file, reported[file])
        assert f"{bad} skipped in total" in output
        assert all(f"{count} {reason}" in output for reason, count in kinds.items())


def test_training_with_bad_files_equals_training_on_the_good_ones(tmp_path, capsys):
    assert len(BAD) >= 20
    prove(tmp_path, 90, 2 * len(BAD), 3, capsys)


@pytest.mark.slow
def test_200_bad_files_of_2000_do_not_change_a_bit(tmp_path, capsys):
    prove(tmp_path, 1_800, 200, 40, capsys)


def test_too_many_bad_files_are_an_error_of_one_line(tmp_path, capsys):
    make_good(tmp_path / "data", 20)
    add_bad(tmp_path / "data", 14)
    with pytest.raises(SystemExit) as stopped:
        run_here(*STAGE_1, f"data.folder={tmp_path}/data", f"run={tmp_path}/run", "data.max_bad_fraction=0.4", *OPTIONS)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "14 of 34 entries" in line and "data.max_bad_fraction 0.4" in line
    assert not (tmp_path / "run").exists()


def test_bad_files_are_replaced_during_training_without_a_data_check(tmp_path, capsys):
    make_good(tmp_path / "data", 20)
    expected = add_bad(tmp_path / "data", len(BAD))
    run = tmp_path / "run"
    run_here(*STAGE_1, f"data.folder={tmp_path}/data", f"run={run}", "data.verify=false", "trainer.steps=12",
             "data.max_bad_fraction=0.9", *OPTIONS)  # fmt: skip
    reported = skips(run)
    assert 10 < len(reported) <= len(expected) and all(reported[name].startswith(expected[name]) for name in reported)
    assert not (run / "verified-0.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_during_training_are_an_error_of_one_line(tmp_path, capfd, workers):
    make_good(tmp_path / "data", 20)
    add_bad(tmp_path / "data", 14)
    options = ["data.max_bad_fraction=0.2", "data.verify=false", f"trainer.workers={workers}", "trainer.steps=20"]
    with pytest.raises(SystemExit) as stopped:
        run_here(*STAGE_1, f"data.folder={tmp_path}/data", f"run={tmp_path}/run", *OPTIONS[2:], *options)
    lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "error" in line.lower()]
    assert stopped.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and "images can't be used, more than data.max_bad_fraction 0.2" in lines[0]


def test_an_image_damaged_later_is_replaced_by_the_same_with_any_number_of_workers(tmp_path):
    make_good(tmp_path / "data", 12)
    states = []
    for workers in (0, 1):
        run = tmp_path / f"run{workers}"
        run_here(*STAGE_1, f"data.folder={tmp_path}/data", f"run={run}", "trainer.steps=2", *OPTIONS)
        victim = sorted((tmp_path / "data").glob("*.png"))[0]
        good = victim.read_bytes()
        victim.write_bytes(b"x" * len(good))  # the same size, so that the fingerprint does not change
        options = ["trainer.steps=6", f"trainer.workers={workers}", "data.verify=false"]
        run_here(*STAGE_1, f"data.folder={tmp_path}/data", f"run={run}", *OPTIONS, *options)
        assert list(skips(run)) == [victim.name]
        victim.write_bytes(good)
        states.append(final_state(run))
    assert states[0] == states[1]


@pytest.mark.slow
def test_processes_share_the_data_check(tmp_path):
    make_good(tmp_path / "data", 60)
    expected = add_bad(tmp_path / "data", len(BAD))
    run = tmp_path / "run"
    launch(*STAGE_1, f"data.folder={tmp_path}/data", f"run={run}", "trainer.steps=2", *OPTIONS, processes=2)
    assert set(skips(run)) == set(expected)
    lines = [(run / f"verified-{rank}.jsonl").read_text().split("\n") for rank in (0, 1)]
    names = [{json.loads(line)["name"] for line in part if line} for part in lines]
    assert not names[0] & names[1] and abs(len(names[0]) - len(names[1])) <= 2


def test_a_resumed_run_reports_earlier_skips_and_a_new_run_does_not(tmp_path, capsys):
    make_good(tmp_path / "data", 20)
    add_bad(tmp_path / "data", len(BAD))
    run = tmp_path / "run"
    options = [f"data.folder={tmp_path}/data", f"run={run}", "data.verify=false", "data.max_bad_fraction=0.9", *OPTIONS]
    run_here(*STAGE_1, *options, "trainer.steps=12")
    earlier = skips(run)
    capsys.readouterr()
    run_here(*STAGE_1, *options, "trainer.steps=12")  # all steps are done
    assert skips(run) == earlier and f"{len(earlier)} skipped in total" in capsys.readouterr().out
    run_here(*STAGE_1, *options, "trainer.steps=1", "trainer.resume=false")
    assert len(skips(run)) < len(earlier)


def test_a_stopped_run_reports_what_it_skipped(tmp_path, capsys):
    make_good(tmp_path / "data", 12)
    (tmp_path / "data" / "bad.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        run_here(
            *STAGE_1, f"data.folder={tmp_path}/data", f"run={tmp_path}/run", "trainer.max_minutes=0.00001", *OPTIONS
        )
    output = capsys.readouterr().out
    assert "stopped at step 1" in output and "1 skipped in total" in output


def test_a_disk_error_at_one_image_is_an_error_of_one_line(tmp_path, capsys, monkeypatch):
    make_good(tmp_path / "data", 12)
    victim = sorted((tmp_path / "data").glob("*.png"))[0]

    def fail(source, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO)) if source == str(victim) else UnusableImage("x")

    monkeypatch.setattr("stipple_core.data.verify.load_image", fail)
    with pytest.raises(SystemExit) as stopped:
        run_here(*STAGE_1, f"data.folder={tmp_path}/data", f"run={tmp_path}/run", *OPTIONS)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code and line == f"error: {victim}: Input/output error"
    assert not (tmp_path / "run").exists()
