"""The folder of a run: one run at a time, whatever becomes of the one before."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stipple.training.distributed.collective import ReportedByMain
from stipple.training.run.run_folder import RunFolder, disk_errors


def forked(act: Callable[[], None]) -> int:
    """Begin a process that does something; its number."""
    process = os.fork()
    if process == 0:
        try:
            act()
        finally:
            os._exit(0)
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


@pytest.fixture
def holder(tmp_path) -> int:
    """A process that holds tmp_path / "run", and has a worker of its own that outlives it."""

    def hold() -> None:
        folder = RunFolder(tmp_path / "run", 2)
        folder.take()
        (tmp_path / "worker").write_text(str(forked(lambda: time.sleep(60))))
        os.rename(tmp_path / "worker", tmp_path / "held")
        time.sleep(60)

    process = forked(hold)
    wait_for(tmp_path / "held")
    yield process
    os.kill(int((tmp_path / "held").read_text()), signal.SIGKILL)


def test_a_folder_that_is_held_is_refused_and_free_again_when_its_holder_is_killed(holder, tmp_path):
    with pytest.raises(
        ValueError, match="run is in use by another run, process \\d+ on \\S+; wait for it or choose another folder$"
    ):
        RunFolder(tmp_path / "run", 2).take()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    RunFolder(tmp_path / "run", 2).take()  # though a worker of the killed one lives on


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    RunFolder(tmp_path, 2).take()
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path} can't be locked (No locks available)") and said.count("\n") == 1


def test_a_failing_disk_is_one_line_that_says_where_to_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert said.startswith("error: metrics.jsonl: No space left on device; there is no checkpoint yet; ")


@pytest.mark.parametrize("linked", [False, True])
def test_a_run_begun_anew_takes_nothing_up_also_where_its_checkpoints_are_on_another_disk(linked, tmp_path):
    run, elsewhere = RunFolder(tmp_path / "run", 2), tmp_path / "elsewhere"
    run.take()
    elsewhere.mkdir()
    if linked:
        (run.path / "state").symlink_to(elsewhere)
    run.save(3, {"step": 3})
    assert run.newest(resume=True) == run.checkpoint(3)
    (run.path / "state" / "notes").write_text("")
    assert run.newest(resume=False) is None and run.newest(resume=True) is None
    assert os.listdir(run.path / "state") == [] and (run.path / "state").is_symlink() == linked
    assert elsewhere.is_dir()


def test_checkpoints_that_can_not_be_removed_end_a_run_that_is_begun_anew(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, 2)
    run.save(3, {"step": 3})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "state.json")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        run.newest(resume=False)
    monkeypatch.undo()


def ended_by(error: OSError, folder: Path, capsys) -> str:
    """What a run says that ends by an error."""
    with pytest.raises(SystemExit) as ended, disk_errors(folder):
        raise error
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") <= 1
    return said


def test_only_a_full_disk_is_answered_by_making_room_and_an_error_without_a_text_by_its_name(tmp_path, capsys):
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert "; make room there and run the same" in ended_by(OSError(number, os.strerror(number)), tmp_path, capsys)
    refused = ended_by(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), tmp_path, capsys)
    assert refused == "error: Connection refused; there is no checkpoint yet; mend that and run the same again\n"
    assert ended_by(TimeoutError(), tmp_path, capsys).startswith("error: TimeoutError; ")


def test_a_failing_disk_is_told_without_reading_checkpoints_and_by_the_main_process_alone(
    tmp_path, capsys, monkeypatch
):
    RunFolder(tmp_path, 2).save(3, {"step": 3})
    monkeypatch.setattr("stipple_core.files.manifest._sha256", lambda path: pytest.fail(f"{path} was read"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model")
    assert f"the last good checkpoint is {tmp_path}/state/step-0000003" in ended_by(full, tmp_path, capsys)
    assert ended_by(ReportedByMain(errno.ENOSPC, "x"), tmp_path, capsys) == ""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert ended_by(full, tmp_path, capsys) == "error: process 1: model: No space left on device\n"
