"""The folder of one run, of which one run at a time has the use: its checkpoints `state/step-N` and its `model`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from stipple.training.distributed.collective import ReportedByMain
from stipple_core.files import checkpoint_folder as checkpoint
from stipple_core.files.manifest import MANIFEST, make_directory

LOCK = ".lock"  # file in a run folder that is locked while a run uses it, and names the process
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class RunFolder:
    """The files of a run, as its main process sees them; nothing is written before `take`."""

    def __init__(self, path: str | Path, keep: int, product: str = "model"):
        self.path, self.keep, self._product = Path(path), keep, product
        self._lock: IO | None = None
        self._made: list[Path] = []  # by `take`, the innermost first

    def take(self) -> None:
        """Make the folder and hold it for the life of the process, however that ends; if it is held, do nothing.

        Over NFS the lock holds between machines, too (Linux asks the server), and is free some time after a machine has
        died. A file system that knows no locks is used without, with a warning. Raises ValueError where another run
        holds the folder.
        """
        if self._lock is not None:
            return
        lock_path = self.path / LOCK
        new = [lock_path] * (not lock_path.exists())
        self._made = new + make_directory(self.path)
        lock = open(lock_path, "a+")  # noqa: SIM115  (held open, and so locked, until it is collected)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"{self.path} is in use by another run, {holder(self.path)}; wait for it or choose another folder"
            ) from None
        except OSError as error:
            told = f"{self.path} can't be locked ({error.strerror})"
            print(f"warning: {told}; see to it that no other run uses it", file=sys.stderr)
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        lock.flush()
        os.register_at_fork(after_in_child=_closing(weakref.ref(lock)))  # workers would hold it after this process
        self._lock = lock

    def leave(self) -> None:
        """Undo `take` where nothing was written since, so that a run that is refused now leaves no trace."""
        if self._lock is None or not self._made or os.listdir(self.path) != [self._made[0].name]:
            return
        with suppress(OSError):
            self._made[0].unlink()
            for folder in self._made[1:]:
                folder.rmdir()
        self._lock.close()
        self._lock = None

    def newest(self, resume: bool) -> Path | None:
        """The newest valid checkpoint, what an interrupted run left half done being removed; None if there is none.

        With `resume` false the checkpoints are removed: what is saved now would be pruned as older than they are.
        Raises OSError where that fails; ValueError where there are checkpoints, but no valid one, or a file lies where
        a folder belongs.
        """
        state = self.path / "state"
        for folder in (state, self.model):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, where a run has a folder; remove it, or choose another `run`")
        if not resume:
            _empty(state)
        for folder in (self.path, state):
            checkpoint.clear_temporaries(folder)
        found = checkpoint.newest_valid(state) if resume else None
        if found is None and (damaged := len(checkpoint.checkpoints(state))):
            mend = "mend one, or begin anew with --no-resume, which removes them"
            raise ValueError(f"no checkpoint of {damaged} in {state} is valid, and --resume never begins anew; {mend}")
        return found

    def checkpoint(self, step: int) -> Path:
        """Where the state after an optimizer step is saved."""
        return self.path / "state" / f"step-{step:07d}"

    @property
    def model(self) -> Path:
        """Where the model is saved, or what of it is the run's product."""
        return self.path / self._product

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically."""
        checkpoint.write_folder(self.checkpoint(step), lambda path: checkpoint.save_state(path, state))

    def has_model(self, step: int) -> bool:
        """Whether the model is whole, and was written after the checkpoint of a step was."""
        times = [(folder / MANIFEST) for folder in (self.checkpoint(step), self.model)]
        if not all(path.is_file() for path in times):
            return False
        saved, written = (path.stat().st_mtime_ns for path in times)
        return saved < written and checkpoint.problem(self.model) is None

    def prune(self) -> None:
        """Remove old checkpoints; after the newest one and its model are there."""
        checkpoint.prune(self.path / "state", self.keep)


@dataclass(frozen=True)
class Holder:
    """The process that last held the lock of a run folder."""

    pid: int | None
    host: str | None

    def __str__(self) -> str:
        return "of an older version of Stipple" if self.pid is None else f"process {self.pid} on {self.host}"


def holder(folder: str | Path) -> Holder:
    """Return the process that the lock file of a run folder names."""
    try:
        values = json.loads((Path(folder) / LOCK).read_text(encoding="utf-8"))
        return Holder(int(values["pid"]), str(values["host"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Holder(None, None)


def in_use(folder: str | Path) -> bool:
    """Return whether a run holds the lock of a folder. Raises OSError where the file system has no locks."""
    try:
        with open(Path(folder) / LOCK, "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _empty(folder: Path) -> None:
    """Remove all that is in a folder, if there is one; itself may be a symbolic link, to one on another disk."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _closing(lock: weakref.ref[IO]) -> Callable[[], None]:
    """What closes a file that a fork has inherited, if it is still there."""

    def close() -> None:
        if (file := lock()) is not None:
            file.close()

    return close


@contextmanager
def disk_errors(run: str | Path) -> Iterator[None]:
    """Turn a disk that fails under a run into one line, which names the checkpoint to go on from, and exit code 1.

    Where the main process tells of it the others do not; a failure of another process's own is told by that one.
    """
    try:
        yield
    except ReportedByMain:
        raise SystemExit(1) from None
    except OSError as error:
        told = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        told = f"{error.filename}: {told}" if error.filename else told
        if rank := torch.distributed.get_rank() if torch.distributed.is_initialized() else 0:
            print(f"error: process {rank}: {told}", file=sys.stderr)
            raise SystemExit(1) from None
        last = checkpoint.newest_valid(Path(run) / "state", sums=False)
        kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        mend = "make room there" if error.errno in NO_ROOM else "mend that"
        print(f"error: {told}; {kept}; {mend} and run the same again", file=sys.stderr)
        raise SystemExit(1) from None
