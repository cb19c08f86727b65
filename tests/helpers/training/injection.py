"""Fault injection at calls that change the disk: each write, fsync, rename, creation or removal is an event.

A fault happens once, at the n-th event of a process. An error does half of a write and then raises OSError. A kill does
half of a write and then ends the process by SIGKILL.
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
    """Counts events and fails at one of them, in a process that was forked for this.

    Args:
        fault: a key of FAULTS.
        at: the event's number, from 0.
        log: a file to which each event is appended as `name path` before it happens.
        inside: the folder that is watched; other calls are not counted.
    """

    def __init__(self, fault: str, at: int, log: Path, inside: Path):
        self.error, self.at, self.inside, self.count = FAULTS[fault], at, str(inside), 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        """Replace the calls for the rest of the process."""
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        real_open, real_save = builtins.open, safetensors.torch.serialize_file

        def open_watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            opened = real_open(file, mode, *arguments, **options)
            watched = not isinstance(file, int) and os.fspath(file).startswith(self.inside)
            return _File(opened, self) if watched and set(mode) & set("wax+") else opened

        def save_watched(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
            self.event("safetensors", path, lambda: self._half_saved(real_save, tensors, path))
            real_save(tensors, path, *arguments, **options)

        builtins.open = io.open = open_watched
        safetensors.torch.serialize_file = save_watched

    def event(self, name: str, path: Any, half: Callable[[], Any] = lambda: None) -> None:
        """Log an event, and fail after half of its work if it is the chosen one."""
        os.write(self.log, f"{name} {path}\n".encode())
        self.count += 1
        if self.count == self.at + 1:
            half()
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "safetensors":  # the library raises its own exception
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
            if name != "fsync":  # a killed process loses nothing without fsync
                return call(path, *arguments, **options)

        return inner

    def _half_saved(self, save: Callable, tensors: Any, path: Any) -> None:
        save(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)


class _File:
    """An open file whose writes are events."""

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
    """How a process ended."""

    code: int  # exit code; negative: the signal
    output: str  # stdout and stderr
    events: list[str]
    at: int  # number of the event that failed


def forked(act: Callable[[], None], place: Path, fault: str = "kill", at: int = 1 << 30) -> End:
    """Call `act` in a forked process, in which one event in the folder `place` fails."""
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder) / "events", Path(folder) / "output"
        process = os.fork()
        if process == 0:
            _act(act, place, output, Disk(fault, at, log, place))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return End(code, output.read_text(), log.read_text().splitlines(), at)


def _act(act: Callable[[], None], place: Path, output_path: Path, disk: Disk) -> None:
    """Call `act`, then end this process as a script would; its output goes to a file."""
    code = 70
    try:
        output = os.open(output_path, os.O_WRONLY | os.O_CREAT)
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
