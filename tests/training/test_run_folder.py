"""The run folder: its lock, and errors of its disk."""

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
from stipple.training.run.run_folder import Holder, RunFolder, disk_errors, in_use
from stipple.training.run.run_folder import holder as lock_holder


def forked(act: Callable[[], None]) -> int:
    """Fork a process that calls a function; returns its process id."""
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
    """A process that locks tmp_path / "run", and has a worker that outlives it."""

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


def test_a_locked_folder_is_refused_and_is_free_when_its_process_was_killed(holder, tmp_path):
    with pytest.raises(
        ValueError, match=r"run is in use by another run, process \d+ on \S+; wait for it or choose .*$"
    ):
        RunFolder(tmp_path / "run", 2).take()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    RunFolder(tmp_path / "run", 2).take()  # although a worker of the killed process is still running


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    RunFolder(tmp_path, 2).take()
    message = capsys.readouterr().err
    assert message.startswith(f"warning: {tmp_path} can't be locked (No locks available)") and message.count("\n") == 1


def test_without_locks_a_second_run_leaves_the_name_of_the_first_in_the_lock_file(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text('{"pid": 7, "host": "here"}')

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    RunFolder(tmp_path, 2).take()
    assert (tmp_path / ".lock").read_text() == '{"pid": 7, "host": "here"}'


def test_a_folder_is_locked_although_the_full_disk_has_no_space_for_the_name_of_the_process(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = RunFolder(tmp_path, 2)
    monkeypatch.setattr(os, "write", full)
    folder.take()
    monkeypatch.undo()
    assert in_use(tmp_path) and lock_holder(tmp_path) == Holder(None, None)
    with pytest.raises(ValueError, match="is in use by another run, an unknown process; wait for it"):
        RunFolder(tmp_path, 2).take()


def test_a_full_disk_ends_a_run_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.count("\n") == 1
    assert message.startswith("error: metrics.jsonl: No space left on device; there is no checkpoint yet; ")


@pytest.mark.parametrize("linked", [False, True])
def test_no_resume_removes_checkpoints_also_from_another_disk(linked, tmp_path):
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


def test_no_resume_fails_if_checkpoints_can_not_be_removed(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, 2)
    run.save(3, {"step": 3})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "state.json")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        run.newest(resume=False)
    monkeypatch.undo()


def ended_by(error: OSError, folder: Path, capsys) -> str:
    """The message of a run that ends by an error."""
    with pytest.raises(SystemExit) as ended, disk_errors(folder):
        raise error
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.count("\n") <= 1
    return message


def test_only_for_a_full_disk_the_fix_is_to_free_space_and_an_error_without_a_text_has_its_name(tmp_path, capsys):
    for number in (errno.ENOSPC, errno.EDQUOT):
        message = ended_by(OSError(number, os.strerror(number)), tmp_path, capsys)
        assert "; free some disk space and run the same command" in message
    refused = ended_by(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), tmp_path, capsys)
    assert refused == "error: Connection refused; there is no checkpoint yet; fix that and run the same command again\n"
    assert ended_by(TimeoutError(), tmp_path, capsys).startswith("error: TimeoutError; ")


def test_a_disk_error_is_printed_without_reading_checkpoints_and_by_the_main_process_alone(
    tmp_path, capsys, monkeypatch
):
    RunFolder(tmp_path, 2).save(3, {"step": 3})
    monkeypatch.setattr("stipple_core.files.manifest.file_sha256", lambda path: pytest.fail(f"{path} was read"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model")
    assert f"the last good checkpoint is {tmp_path}/state/step-0000003" in ended_by(full, tmp_path, capsys)
    assert ended_by(ReportedByMain(errno.ENOSPC, "x"), tmp_path, capsys) == ""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert ended_by(full, tmp_path, capsys) == "error: process 1: model: No space left on device\n"
