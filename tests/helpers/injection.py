"""Faults at the calls that touch the disk: each file written to, made durable, renamed, made or removed is an event.

A fault happens once, at the n-th event of a process. An error lets the call do half of its work where it has halves,
then raises OSError; a kill does the same, then ends the process as SIGKILL does.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from stipple.training.run.run_folder import disk_errors

FAULTS = {"kill": None, "full disk": errno.ENOSPC, "input/output error": errno.EIO}
CALLS = (
    "rename",
    "replace",
    "fsync",
    "mkdir",
    "unlink",
    "remove",
    "rmdir",
    "chmod",
)  # of os; also in rmtree


class Disk:
    """Counts events, and fails at one of them; for a process that was forked for this and ends with it.

    Args:
        fault: a key of FAULTS.
        at: the event's number, from 0.
        log: a file to which each event is appended, before it happens, as `name path`.
        inside: the folder that is watched; calls elsewhere are none of our events.
    """

    def __init__(self, fault: str, at: int, log: Path, inside: Path):
        self.error, self.at, self.inside, self.count = FAULTS[fault], at, str(inside), 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        """Take the place of the calls, for the rest of the process's life."""
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        real_open, real_save = builtins.open, safetensors.torch.serialize_file

        def open_watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            opened = real_open(file, mode, *arguments, **options)
            ours = not isinstance(file, int) and os.fspath(file).startswith(self.inside)
            return _File(opened, self) if ours and set(mode) & set("wax+") else opened

        def save_watched(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
            self.event("safetensors", path, lambda: self._half_saved(real_save, tensors, path))
            real_save(tensors, path, *arguments, **options)

        builtins.open = io.open = open_watched
        safetensors.torch.serialize_file = save_watched

    def event(self, name: str, path: Any, half: Callable[[], Any] = lambda: None) -> None:
        """Note an event; fail if its time has come, after half of its work."""
        os.write(self.log, f"{name} {path}\n".encode())
        self.count += 1
        if self.count == self.at + 1:
            half()
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "safetensors":  # which has an exception of its own
                raise SafetensorError(f"I/O error: {os.strerror(self.error)} (os error {self.error})")
            raise OSError(self.error, os.strerror(self.error), str(path))

    def _watched(self, name: str, call: Callable) -> Callable:
        def inner(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, int):  # fsync
                path_of = os.readlink(f"/proc/self/fd/{path}")
            elif options.get("dir_fd") is not None:  # rmtree
                path_of = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), os.fspath(path))
            else:
                path_of = os.fspath(path)
            if path_of.startswith(self.inside):
                self.event(name, arguments[0] if name in ("rename", "replace") else path_of)
            if name != "fsync":  # a process that dies loses nothing by not waiting for the disk
                return call(path, *arguments, **options)

        return inner

    def _half_saved(self, save: Callable, tensors: Any, path: Any) -> None:
        save(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)


class _File:
    """An open file of which each write is an event."""

    def __init__(self, file: Any, disk: Disk):
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._disk.event("write", self._file.name, half)
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclass(frozen=True)
class End:
    """How a life ended."""

    code: int  # of the process; negative: the signal
    said: str
    events: list[str]
    at: int  # the one that failed


def forked(act: Callable[[], None], place: Path, fault: str = "kill", at: int = 1 << 30) -> End:
    """Do something in a process of its own, whose disk fails at one event in the folder `place`."""
    with tempfile.TemporaryDirectory() as folder:
        log, said = Path(folder) / "events", Path(folder) / "said"
        process = os.fork()
        if process == 0:
            _act(act, place, said, Disk(fault, at, log, place))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return End(code, said.read_text(), log.read_text().splitlines(), at)


def _act(act: Callable[[], None], place: Path, said: Path, disk: Disk) -> None:
    """Do something, then end this process as a script would; what it prints goes to the file `said`."""
    code = 70
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        disk.install()
        with disk_errors(place):
            act()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
