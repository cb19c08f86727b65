"""Files that are there whole or not at all, and locks: of several processes one makes a file, on any machine."""

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
def writing(path: str | os.PathLike[str], mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """A file, open to write, that takes the name `path` once it is whole and durable; `options` are those of `open`.

    Until then it is PATH.tmp-HOST-PID-DRAWN, a name that no other process has. It is removed on any exception; what
    a killed process of this machine left of the same path is removed first. An OSError of a write names the path.
    """
    path = os.fspath(path)
    for leftover in glob.glob(f"{glob.escape(path)}.tmp-*"):
        _remove_if_orphaned(leftover, path)
    temporary = f"{path}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = path
        raise


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold PATH.lock: of several processes one makes a file, the others wait and find it.

    Where the file system knows no locks several may make the same file at a time, each under a name of its own.
    """
    with open(f"{path}.lock", "w") as lock:
        lock_file(lock)
        yield


def lock_file(file: IO[Any]) -> None:
    """Wait for a file's lock and take it until the file is closed; a file system without locks is told once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        _warn(os.path.dirname(file.name) or ".", error.strerror)


@lru_cache(maxsize=64)
def _warn(folder: str, reason: str) -> None:
    told = "processes that find nothing there each make it for themselves"
    print(f"warning: files in {folder} can't be locked ({reason}); {told}", file=sys.stderr)


def _host() -> str:
    return "".join(letter for letter in socket.gethostname() if letter.isalnum() or letter == ".")


def _remove_if_orphaned(temporary: str, path: str) -> None:
    """Remove what a process of this machine wrote that is no more; another machine's can't be asked for."""
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
        return  # somebody else's
