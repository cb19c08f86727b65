"""Atomic writes, where a file appears complete or not at all, and locks between processes."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import IO, Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a temporary path; the file written there is flushed to disk and then renamed to `path`.

    The temporary path is PATH.tmp-HOST-PID-RANDOM, so that two writers never share it. The file is removed if an
    exception is raised. Leftovers of the same path from killed processes of this machine are removed first. An OSError
    names `path`.
    """
    path = os.fspath(path)
    for leftover in glob.glob(f"{glob.escape(path)}.tmp-*"):
        _remove_if_orphaned(leftover, path)
    temporary = f"{path}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            error.filename = path
        raise


@contextmanager
def writing(path: str | os.PathLike[str], mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that replaces `path` atomically when the block ends, as `replacing` does.

    Args:
        path: the file to replace.
        mode, options: as of `open`.
    """
    with replacing(path) as temporary, open(temporary, mode, **options) as file:
        yield file


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold an exclusive lock on PATH.lock; other processes wait until it is released.

    On a file system without locks the block runs without one, and several processes may write the same file. That is
    safe with `writing`, because each uses its own temporary file.
    """
    with open(f"{path}.lock", "w") as lock:
        lock_file(lock)
        yield


def lock_file(file: IO[Any]) -> None:
    """Wait for the exclusive lock of an open file. It is released when the file is closed.

    Prints a warning, once per folder, if the file system does not support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        _warn(os.path.dirname(file.name) or ".", error.strerror)


@lru_cache(maxsize=64)
def _warn(folder: str, reason: str) -> None:
    consequence = "each process that finds a file missing makes its own copy"
    print(f"warning: files in {folder} can't be locked ({reason}); {consequence}", file=sys.stderr)


def _host() -> str:
    return "".join(letter for letter in socket.gethostname() if letter.isalnum() or letter == ".")


def _remove_if_orphaned(temporary: str, path: str) -> None:
    """Remove a temporary file if the process of this machine that wrote it has ended."""
    host, _, rest = temporary.removeprefix(f"{path}.tmp-").partition("-")
    pid = rest.partition("-")[0]
    if host != _host() or not pid.isdigit():
        return
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        with suppress(OSError):
            os.remove(temporary)
    except (OSError, OverflowError):
        return  # the process belongs to another user
