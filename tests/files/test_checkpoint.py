"""Checkpoints: state is read back equal, a crash at any moment leaves a complete folder, and nothing is pickled."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from stipple_core.files import checkpoint_folder as checkpoint


def write(folder: Path, text: str) -> None:
    """Write a folder of two files and a subfolder by `write_folder`."""

    def fill(path: Path) -> None:
        (path / "weights").write_text(text * 100)
        (path / "inner").mkdir()
        (path / "inner" / "config.json").write_text(json.dumps({"text": text}))

    checkpoint.write_folder(folder, fill)


def read(folder: Path) -> str:
    return json.loads((folder / "inner" / "config.json").read_text())["text"]


def steps(folder: Path, *numbers: int) -> None:
    for number in numbers:
        write(folder / f"step-{number:07d}", f"step {number}")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def damage(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_state_is_read_back_equal(tmp_path):
    shared = torch.randn(3, 3)
    state = {
        "weights": {"a.b/c": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "t": shared.T},
        "same": [shared, shared[0], {"deep": shared}],
        "kinds": [torch.tensor(3), torch.tensor([True]), torch.randn(2).to(torch.bfloat16), torch.empty(0, 2)],
        3: {"$tensor": "a text", "$dict": None, "": -0.1},
        "numbers": [1, True, None, 1e-300, math.inf, "ü\n", 2**70],
        "empty": [{}, [], ""],
    }
    checkpoint.save_state(tmp_path, state)
    back = checkpoint.load_state(tmp_path)
    assert list(back) == list(state)
    for name, tensor in state["weights"].items():
        assert torch.equal(back["weights"][name], tensor)
    assert all(torch.equal(a, b) for a, b in zip(back["same"][:2], state["same"][:2], strict=True))
    assert torch.equal(back["same"][2]["deep"], shared)
    for a, b in zip(back["kinds"], state["kinds"], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert back[3] == state[3] and back["numbers"] == state["numbers"] and back["empty"] == state["empty"]
    assert [type(value) for value in back["numbers"]] == [type(value) for value in state["numbers"]]


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for module, name in [(pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(module, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    checkpoint.save_state(tmp_path, {"step": 1, "weights": torch.zeros(2)})
    assert checkpoint.load_state(tmp_path)["step"] == 1
    assert names(tmp_path) == ["state.json", "state.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, "0o644"), (0o077, "0o600"), (0o002, "0o664")])
def test_files_have_the_permissions_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        checkpoint.write_folder(tmp_path / "state", lambda path: checkpoint.save_state(path, {"a": torch.zeros(2)}))
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "state").iterdir()} == {mode}


def test_a_file_of_another_process_that_is_not_visible_is_an_error(tmp_path):
    def share(path: Path) -> dict[str, str]:
        checkpoint.save_state(path, {"weights": torch.zeros(2)})
        return {"state-1.safetensors": "0" * 64}

    with pytest.raises(OSError, match="a shared disk.*state-1.safetensors"):
        checkpoint.write_folder(tmp_path / "step-0000001", share)
    assert names(tmp_path) == []


def test_new_parent_folders_of_a_checkpoint_are_made_durable(tmp_path, monkeypatch):
    synced = []

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "runs" / "run" / "state" / "step-0000001", "x")
    assert {str(tmp_path), f"{tmp_path}/runs", f"{tmp_path}/runs/run", f"{tmp_path}/runs/run/state"} <= set(synced)


def test_a_value_that_is_neither_tensor_nor_json_is_an_error_that_names_it(tmp_path):
    with pytest.raises(TypeError, match="/parts/0: a Path|/parts/0: a PosixPath"):
        checkpoint.save_state(tmp_path, {"parts": [Path("x")]})


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path):
    write(tmp_path / "model", "old")

    def fail(path: Path) -> None:
        (path / "weights").write_text("half")
        raise OSError("no space left on device")

    for name in ("model", "other"):
        with pytest.raises(OSError, match="no space left"):
            checkpoint.write_folder(tmp_path / name, fail)
    assert names(tmp_path) == ["model"] and read(tmp_path / "model") == "old"
    assert checkpoint.problem(tmp_path / "model") is None


def test_a_crash_at_any_call_leaves_the_old_or_the_new_folder_complete(tmp_path):
    """A forked process exits at the n-th call that changes the disk, for every n."""
    outcomes = []
    for n in range(1000):
        folder = tmp_path / str(n)
        steps(folder, 1)
        child = os.fork()
        if child == 0:
            _die_at_call(n)
            write(folder / "step-0000001", "new")
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        checkpoint.clear_temporaries(folder)
        assert names(folder) == ["step-0000001"]
        assert checkpoint.problem(folder / "step-0000001") is None
        outcomes.append(read(folder / "step-0000001"))
        if finished:
            break
    assert outcomes[-1] == "new" and len(outcomes) > 15
    assert outcomes == sorted(outcomes, key=["step 1", "new"].index)


def _die_at_call(n: int) -> None:
    """Patch the calls that change the disk so that the n-th one ends this process at once."""
    calls = iter(range(n))

    def mortal(call):
        def inner(*arguments, **options):
            if next(calls, None) is None:
                os._exit(9)
            return call(*arguments, **options)

        return inner

    for name in ("rename", "fsync", "mkdir", "rmdir", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    shutil.rmtree = mortal(shutil.rmtree)
    Path.write_text = mortal(Path.write_text)


def test_files_are_flushed_to_disk_before_the_folder_is_renamed(tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(os, "fsync", lambda handle, real=os.fsync: (log.append("fsync"), real(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b, real=os.rename: (log.append("rename"), real(a, b)))
    write(tmp_path / "model", "x")
    # two files, the manifest, the inner folder, the temporary folder; the rename; the parent folder
    assert log == ["fsync"] * 5 + ["rename", "fsync"]


@pytest.mark.parametrize("damage_kind", ["a bit", "the end", "a file", "the manifest", "half the manifest"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(damage_kind, tmp_path, capsys):
    steps(tmp_path, 1, 2, 10)
    newest = tmp_path / "step-0000010"
    assert checkpoint.newest_valid(tmp_path) == newest and capsys.readouterr().err == ""
    if damage_kind == "a bit":
        damage(newest / "weights")
    elif damage_kind == "the end":
        os.truncate(newest / "weights", 10)
    elif damage_kind == "a file":
        (newest / "inner" / "config.json").unlink()
    elif damage_kind == "the manifest":
        (newest / "manifest.json").unlink()
    else:
        os.truncate(newest / "manifest.json", 30)
    assert checkpoint.newest_valid(tmp_path) == tmp_path / "step-0000002"
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and f"checkpoint {newest} is not used: " in output
    assert {"a bit": "weights is damaged", "a file": "config.json is missing"}.get(damage_kind, "") in output


def test_newest_valid_returns_none_if_no_checkpoint_is_valid(tmp_path, capsys):
    assert checkpoint.newest_valid(tmp_path / "missing") is None
    steps(tmp_path, 1)
    damage(tmp_path / "step-0000001" / "manifest.json")
    assert checkpoint.newest_valid(tmp_path) is None and "is not used" in capsys.readouterr().err


def test_pruning_keeps_the_newest_valid_ones_and_never_fewer_than_two(tmp_path):
    steps(tmp_path, 1, 2, 3, 4, 5, 6)
    checkpoint.prune(tmp_path, 3)
    assert [int(name[5:]) for name in names(tmp_path)] == [4, 5, 6]
    checkpoint.prune(tmp_path, 0)
    assert [int(name[5:]) for name in names(tmp_path)] == [5, 6]


@pytest.mark.parametrize("put", ["a file", "a link"])
def test_a_file_or_link_at_the_path_of_a_folder_is_replaced_and_removed(put, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder, aside = tmp_path / "model", tmp_path / ".tmp-old-model"
    for place in (folder, aside):
        place.symlink_to("elsewhere") if put == "a link" else place.write_text("x")
    checkpoint.write_folder(folder, lambda path: (path / "weights").write_text("new"))
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "model"] and (folder / "weights").read_text() == "new"
    aside.symlink_to("elsewhere") if put == "a link" else aside.write_text("x")
    checkpoint.clear_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "model"]


def test_an_incomplete_checkpoint_does_not_count_as_kept(tmp_path):
    """Only sizes are compared: sums would require reading everything at each save."""
    steps(tmp_path, 1, 2, 3, 4)
    os.truncate(tmp_path / "step-0000004" / "weights", 10)
    os.truncate(tmp_path / "step-0000001" / "weights", 10)
    checkpoint.prune(tmp_path, 2)
    assert [int(name[5:]) for name in names(tmp_path)] == [2, 3, 4]


def test_leftovers_of_an_interrupted_write_are_removed_and_moved_folders_restored(tmp_path):
    steps(tmp_path, 1, 2, 3)
    os.rename(tmp_path / "step-0000002", tmp_path / ".tmp-old-step-0000002")  # killed before the new folder was renamed
    write(tmp_path / ".tmp-old-step-0000003", "older")  # killed after the rename
    (tmp_path / ".tmp-step-0000004").mkdir()
    (tmp_path / ".tmp-step-0000004" / "half").write_text("half")
    checkpoint.clear_temporaries(tmp_path)
    assert names(tmp_path) == ["step-0000001", "step-0000002", "step-0000003"]
    assert [read(tmp_path / name) for name in names(tmp_path)] == ["step 1", "step 2", "step 3"]
