"""The folder of one run, of which one run at a time has the use: its checkpoints `state/step-N` and its `model`."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from storage import checkpoint


class RunFolder:
    """The files of a run, as its main process sees them; nothing is written before `take`."""

    def __init__(self, path: str | Path, keep: int):
        self.path, self.keep = Path(path), keep
        self._lock: IO | None = None

    def take(self) -> None:
        """Make the folder and hold it for the life of the process, however that ends.

        Over NFS the lock holds between machines, too (Linux asks the server), and is free some time after a machine has
        died. A file system that knows no locks is used without, with a warning. Raises ValueError where another run
        holds the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / ".lock", "w")  # noqa: SIM115  (held open, and so locked, until it is collected)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"{self.path} is in use by another run; wait for it or choose another `run`") from None
        except OSError as error:
            told = f"{self.path} can't be locked ({error.strerror})"
            print(f"warning: {told}; see to it that no other run uses it", file=sys.stderr)
        os.register_at_fork(after_in_child=_closing(weakref.ref(lock)))  # workers would hold it after this process
        self._lock = lock

    def newest(self, resume: bool) -> Path | None:
        """The newest valid checkpoint, what an interrupted run left half done being removed; None if there is none.

        With `resume` false the checkpoints are removed: what is saved now would be pruned as older than they are.
        """
        if not resume:
            shutil.rmtree(self.path / "state", ignore_errors=True)
        for folder in (self.path, self.path / "state"):
            checkpoint.clear_temporaries(folder)
        return checkpoint.newest_valid(self.path / "state")

    def checkpoint(self, step: int) -> Path:
        """Where the state after an optimizer step is saved."""
        return self.path / "state" / f"step-{step:07d}"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint atomically."""
        checkpoint.write_folder(self.checkpoint(step), lambda path: checkpoint.save_state(path, state))

    def finish(self, save_model: Callable[[Path], None] | None) -> None:
        """What follows a checkpoint: the model folder, then the removal of old checkpoints."""
        if save_model is not None:
            checkpoint.write_folder(self.path / "model", save_model)
        checkpoint.prune(self.path / "state", self.keep)


def _closing(lock: weakref.ref[IO]) -> Callable[[], None]:
    """What closes a file that a fork has inherited, if it is still there."""

    def close() -> None:
        if (file := lock()) is not None:
            file.close()

    return close


@contextmanager
def disk_errors(run: str | Path) -> Iterator[None]:
    """Turn a disk that fails under a run into one line, which names the checkpoint to go on from, and exit code 1."""
    try:
        yield
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error).strip().splitlines()[-1]
        last = checkpoint.newest_valid(Path(run) / "state")
        kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        print(f"error: {told}; {kept}; mend that, such as by making room, and run the same again", file=sys.stderr)
        raise SystemExit(1) from None
