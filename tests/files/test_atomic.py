"""Atomic writes, and locks on file systems that do not support them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stipple_core.files.atomic import locked, writing


def test_a_file_gets_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with writing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), writing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_two_writers_at_a_time_never_share_a_temporary_file(tmp_path, monkeypatch):
    """Not even with equal process numbers on two machines or in two containers."""
    path = tmp_path / "a"
    with writing(path) as first, writing(path) as second:
        monkeypatch.setattr(socket, "gethostname", lambda: "other-node")
        with writing(path) as third:
            assert len({first.name, second.name, third.name}) == 3 == len(os.listdir(tmp_path))
            for number, file in enumerate((first, second, third)):
                file.write(b"%d" % number * 9)
    assert path.read_bytes() == b"0" * 9 and os.listdir(tmp_path) == ["a"]


def test_leftovers_of_a_killed_process_are_removed_and_files_in_use_are_not(tmp_path):
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); from stipple_core.files.atomic import writing\n"
    code += "with writing(sys.argv[2]) as file: file.write(b'x'); file.flush(); os.kill(os.getpid(), 9)"
    path = tmp_path / "a"
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[2]), str(path)])
    assert [name.startswith("a.tmp-") for name in os.listdir(tmp_path)] == [True]
    kept = {f"a.tmp-another.machine-1-{'0' * 8}", f"a.tmp-{socket.gethostname()}-{os.getppid()}-{'0' * 8}"}
    for name in kept:
        (tmp_path / name).touch()
    with writing(path) as file:
        file.write(b"y")
    assert set(os.listdir(tmp_path)) == {"a", *kept}


def test_an_error_of_a_write_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised, writing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_one_warning(tmp_path, monkeypatch, capsys, number):
    def unknown(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unknown)
    for name in "ab":
        with locked(str(tmp_path / name)):
            pass
    assert capsys.readouterr().err.count("can't be locked") == 1
