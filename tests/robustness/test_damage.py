"""Checkpoints that time or people have changed are found out and named, and the one before them is used."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stipple_core.files import checkpoint_folder as checkpoint

OLD, NEW = "step-0000001", "step-0000002"


@pytest.fixture
def draws() -> random.Random:
    seed = int(os.environ.get("STIPPLE_SEED") or time.time_ns() % 2**32)
    print(f"STIPPLE_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder of two checkpoints, with files of all kinds in them."""

    def fill(path: Path) -> None:
        checkpoint.save_state(path, {"step": 1, "weights": {"a": torch.randn(9), "b": torch.zeros(2, 3)}, "rate": 0.5})
        (path / "unet").mkdir()
        (path / "unet" / "config.json").write_text(json.dumps({"layers": 2}, indent=1))

    for name in (OLD, NEW):
        checkpoint.write_folder(tmp_path / name, fill)
    return tmp_path


def assert_refused(folder: Path, reason: str, capsys) -> None:
    """The newest checkpoint is named, with the reason, in one line, and the one before it taken."""
    assert checkpoint.newest_valid(folder) == folder / OLD
    said = capsys.readouterr().err
    assert said.startswith(f"checkpoint {folder / NEW} is not used: ") and said.count("\n") == 1
    assert reason in said, said


def harm(data: bytes, draws: random.Random) -> tuple[bytes, str]:
    """A file with one bit another, or cut short."""
    if draws.random() < 0.25:
        size = draws.randrange(len(data))
        return data[:size], f"cut to {size} of {len(data)} bytes"
    place = draws.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed), f"bit {place} changed"


def spoil(folder: Path, times: int, draws: random.Random, capsys) -> None:
    """Harm the newest checkpoint so often, once in one file each time."""
    files = sorted(path for path in (folder / NEW).rglob("*") if path.is_file())
    assert len(files) == 4
    for _ in range(times):
        path = draws.choice(files)
        whole = path.read_bytes()
        harmed, how = harm(whole, draws)
        path.write_bytes(harmed)
        try:
            assert_refused(folder, "", capsys)
            if path.name != "manifest.json":
                assert path.name in checkpoint.problem(folder / NEW)
        except AssertionError:
            raise AssertionError(f"{path.name}, {how}, went unnoticed: {harmed[:2000]!r}") from None
        path.write_bytes(whole)
    assert checkpoint.newest_valid(folder) == folder / NEW


def test_300_flipped_bits_and_cut_files_are_all_noticed(saved, draws, capsys):
    spoil(saved, 300, draws, capsys)


@pytest.mark.slow
def test_10000_flipped_bits_and_cut_files_are_all_noticed(saved, draws, capsys):
    spoil(saved, 10_000, draws, capsys)


def test_every_byte_of_the_manifest_counts(saved, draws):
    """Also those of its spaces and names."""
    path = saved / NEW / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << draws.randrange(8)
        path.write_bytes(changed)
        assert checkpoint.problem(saved / NEW, sums=True) is not None, place


def point(path: Path, target: Path) -> None:
    """Make a path a symbolic link."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def rewritten(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A manifest that is written as ours are, of other contents."""

    def write(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))

    return write


def outside(name: str) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        manifest["sha256"][name], manifest["bytes"][name] = "0" * 64, 1

    return change


HOSTILE = {  # what is done to the newest checkpoint, and what is said of it
    "a link to a file": (
        lambda f: point(f / "state.json", f.parent / OLD / "state.json"),
        "state.json is a symbolic link",
    ),
    "a link to a folder": (lambda f: point(f / "unet", f.parent / OLD / "unet"), "unet is a symbolic link"),
    "a link beside the files": (lambda f: point(f / "more", Path("/etc/passwd")), "more is a symbolic link"),
    "a linked manifest": (lambda f: point(f / "manifest.json", f.parent / OLD / "manifest.json"), "no manifest.json"),
    "a linked checkpoint": (lambda f: point(f, f.parent / OLD), "it is a symbolic link"),
    "a pipe": (lambda f: os.mkfifo(f / "state-1.safetensors"), "or not a regular file"),
    "a file more": (lambda f: (f / "state-1.safetensors").write_bytes(b""), "is not in its manifest"),
    "a file of the folder above": (rewritten(outside("../secret")), "../secret is missing"),
    "a file of the system": (rewritten(outside("/etc/passwd")), "/etc/passwd is missing"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "numbers for sums": (rewritten(lambda m: m.update(sha256=3, bytes=4)), "manifest.json is damaged"),
    "lists of names": (rewritten(lambda m: m.update(sha256=["a"], bytes=["a"])), "manifest.json is damaged"),
    "depth": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    "spaces": (lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text() + "\n"), "is damaged"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_checkpoint_that_leads_elsewhere_or_is_none_of_ours_is_not_used(name, saved, capsys):
    change, reason = HOSTILE[name]
    change(saved / NEW)
    assert_refused(saved, reason, capsys)
    checkpoint.prune(saved, 2)  # which passes it over, too, and follows no link
    assert checkpoint.problem(saved / OLD) is None


def test_files_that_a_system_hides_in_every_folder_do_no_harm(saved):
    (saved / NEW / ".DS_Store").write_bytes(b"x")
    assert checkpoint.newest_valid(saved) == saved / NEW


def header(tensors: str) -> bytes:
    return struct.pack("<Q", len(tensors)) + tensors.encode()


EMPTY = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
STATES = {  # of a stranger who writes sound manifests: state.safetensors, state.json, and what is said
    "a header that never ends": (struct.pack("<Q", 10**12) + b"{}", None),
    "500,000 empty tensors": (header("{" + ",".join(EMPTY % i for i in range(500_000)) + "}"), None),
    "a name twice": (header("{" + ",".join([EMPTY % 1] * 2) + "}"), None),
    "no tensors": (header("{}"), None),
    "other text": (None, "{"),
    "a list": (None, "[]"),
    "depth": (None, "[" * 100_000),
    "a tensor that is not there": (None, '{"$dict": [["step", {"$tensor": "/gone"}]]}'),
    "no dictionary": (None, '{"$dict": 3}'),
    "odd pairs": (None, '{"$dict": [["step"]]}'),
    "another key": (None, '{"step": 3}'),
    "a name that is none": (None, '{"$dict": [[[], 3]]}'),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_a_stranger_made_up_is_one_line_and_quick(name, saved):
    tensors, skeleton = STATES[name]

    def fill(path: Path) -> None:
        checkpoint.save_state(path, {"step": 1, "weights": torch.zeros(2)})
        if tensors is not None:
            (path / "state.safetensors").write_bytes(tensors)
        if skeleton is not None:
            (path / "state.json").write_text(skeleton)

    checkpoint.write_folder(saved / NEW, fill)
    assert checkpoint.newest_valid(saved) == saved / NEW
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"{NEW}.* get it again|{NEW}.*does not contain a training state") as caught:
        checkpoint.load_state(saved / NEW)
    assert "\n" not in str(caught.value) and time.monotonic() - started < 3
