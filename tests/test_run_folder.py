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

from training.run_folder import RunFolder, disk_errors


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
    with pytest.raises(ValueError, match="run is in use by another run; wait for it or choose another `run`$"):
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
