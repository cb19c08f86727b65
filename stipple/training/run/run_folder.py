"""The folder of a run: its lock, its checkpoints `state/step-N`, and its `model`."""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from stipple.training.distributed.collective import ReportedByMain
from stipple_core.files import checkpoint_folder as checkpoint
from stipple_core.files.manifest import MANIFEST, make_directory

LOCK = ".lock"  # locked while a run uses the folder; names the process
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunFolder:
    """The files of a run, for its main process; nothing is written before `take`.

    Args:
        path: the folder.
        keep: the number of checkpoints that `prune` leaves.
        product: the name of the folder in it for the trained model, or for the trained part of one.
        accepts_signals: whether the process handles the signals of `stipple signal`; written into the lock file.
    """

    def __init__(self, path: str | Path, keep: int, product: str = "model", accepts_signals: bool = True):
        self.path, self.keep, self._product, self._accepts_signals = Path(path), keep, product, accepts_signals
        self._lock: IO | None = None
        self._created: list[Path] = []  # by `take`, the innermost first

    def take(self) -> None:
        """Create the folder and lock it for the life of the process; do nothing if it is locked by this object.

        The lock also holds between machines over NFS, where it is released some time after a machine died. On a file
        system without locks, a warning is printed.

        Raises:
            ValueError: another run holds the folder.
        """
        if self._lock is not None:
            return
        lock_path = self.path / LOCK
        new = [lock_path] * (not lock_path.exists())
        self._created = new + make_directory(self.path)
        lock = open(lock_path, "a+")  # noqa: SIM115  (locked until it is closed or collected)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(
                f"{self.path} is in use by another run, {holder(self.path)}; wait for it or choose another folder"
            ) from None
        except OSError as error:
            message = f"{self.path} can't be locked ({error.strerror})"
            print(f"warning: {message}; make sure that no other run uses it", file=sys.stderr)
        else:
            _write_holder(lock.fileno(), Holder(os.getpid(), socket.gethostname(), self._accepts_signals))
        os.register_at_fork(after_in_child=_closing(weakref.ref(lock)))  # workers may outlive this process
        self._lock = lock

    def leave(self) -> None:
        """Undo `take` if nothing was written since, so that an invalid run leaves no files behind."""
        if self._lock is None or not self._created or os.listdir(self.path) != [self._created[0].name]:
            return
        with suppress(OSError):
            self._created[0].unlink()
            for folder in self._created[1:]:
                folder.rmdir()
        self._lock.close()
        self._lock = None

    def newest(self, resume: bool) -> Path | None:
        """Return the newest valid checkpoint, or None; temporary files of an interrupted run are removed.

        Without `resume`, all checkpoints are removed, because new ones would be pruned as older than they are.

        Raises:
            OSError: files can't be removed.
            ValueError: there are checkpoints, but no valid one; or a file has the name of a folder of the run.
        """
        state = self.path / "state"
        for folder in (state, self.model):
            if folder.exists() and not folder.is_dir():
                raise ValueError(
                    f"{folder} is a file, and a run needs a folder there; remove it, or choose another `run`"
                )
        if not resume:
            _empty(state)
        for folder in (self.path, state):
            checkpoint.clear_temporaries(folder)
        newest = checkpoint.newest_valid(state) if resume else None
        if newest is None and (damaged := len(checkpoint.checkpoints(state))):
            fix = "restore one, or start again with --no-resume, which removes them"
            raise ValueError(f"none of the {damaged} checkpoints in {state} is valid; {fix}")
        return newest

    def checkpoint(self, step: int) -> Path:
        """The folder of the state after an optimizer step."""
        return self.path / "state" / f"step-{step:07d}"

    @property
    def model(self) -> Path:
        """The folder of the model, or of the trained part of it."""
        return self.path / self._product

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically."""
        checkpoint.write_folder(self.checkpoint(step), lambda path: checkpoint.save_state(path, state))

    def has_model(self, step: int) -> bool:
        """Whether the model folder is complete and newer than the checkpoint of a step."""
        manifests = [(folder / MANIFEST) for folder in (self.checkpoint(step), self.model)]
        if not all(path.is_file() for path in manifests):
            return False
        state_time, model_time = (path.stat().st_mtime_ns for path in manifests)
        return state_time < model_time and checkpoint.problem(self.model) is None

    def prune(self) -> None:
        """Remove old checkpoints; to be called after the newest one and its model are complete."""
        checkpoint.prune(self.path / "state", self.keep)


@dataclass(frozen=True)
class Holder:
    """The process that last held the lock of a run folder."""

    pid: int | None  # None: the lock file names no process
    host: str | None
    accepts_signals: bool = True  # handles the signals of `stipple signal`

    def __str__(self) -> str:
        return "an unknown process" if self.pid is None else f"process {self.pid} on {self.host}"


def holder(folder: str | Path) -> Holder:
    """Return the process that the lock file of a run folder names."""
    try:
        values = json.loads((Path(folder) / LOCK).read_text(encoding="utf-8"))
        return Holder(int(values["pid"]), str(values["host"]), bool(values.get("accepts_signals", True)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Holder(None, None)


def _write_holder(lock: int, process: Holder) -> None:
    """Write a process into its open lock file. The name is only information, so a full disk is no error."""
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(asdict(process)).encode())  # without a buffer, which would be written again later


def in_use(folder: str | Path) -> bool:
    """Return whether a run holds the lock of a folder. Raises OSError if the file system has no locks."""
    try:
        with open(Path(folder) / LOCK, "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _empty(folder: Path) -> None:
    """Remove the contents of a folder, if it exists; the folder may be a symbolic link to another disk."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _closing(lock: weakref.ref[IO]) -> Callable[[], None]:
    """Return a function that closes a file inherited by a fork, if it still exists."""

    def close() -> None:
        if (file := lock()) is not None:
            file.close()

    return close


@contextmanager
def disk_errors(run: str | Path) -> Iterator[None]:
    """Turn an OSError within the block into one line, which names the last checkpoint, and exit code 1.

    An error of the main process is printed by that process alone, and an error of another process by that one.
    """
    try:
        yield
    except ReportedByMain:
        raise SystemExit(1) from None
    except OSError as error:
        message = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        message = f"{error.filename}: {message}" if error.filename else message
        if rank := torch.distributed.get_rank() if torch.distributed.is_initialized() else 0:
            print(f"error: process {rank}: {message}", file=sys.stderr)
            raise SystemExit(1) from None
        last = checkpoint.newest_valid(Path(run) / "state", sums=False)
        saved = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        fix = "free some disk space" if error.errno in DISK_FULL else "fix that"
        print(f"error: {message}; {saved}; {fix} and run the same command again", file=sys.stderr)
        raise SystemExit(1) from None
