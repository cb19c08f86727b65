"""Collective operations on a shared disk: all processes learn of a failure, so that none waits for a failed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list
from torch.distributed import all_gather_object, get_rank, get_world_size

from stipple_core.files import checkpoint_folder as checkpoint
from stipple_core.files.manifest import durable_sha256

T = TypeVar("T")
FileHashes = dict[str, str]  # file name -> SHA-256, of files that a process made durable


class ReportedByMain(OSError):
    """A failure that the main process reports; the others need not."""


@dataclass(frozen=True)
class ErrorSummary:
    """An error of one process, as it is sent to the others."""

    message: str
    number: int | None  # the errno of an OSError
    path: str | None  # its file
    is_value_error: bool

    @classmethod
    def of(cls, error: Exception) -> ErrorSummary:
        """Summarize an error."""
        if isinstance(error, OSError) and error.errno is not None:
            path = None if error.filename is None else str(error.filename)
            return cls(error.strerror or type(error).__name__, error.errno, path, False)
        return cls(str(error) or type(error).__name__, None, None, isinstance(error, ValueError))

    def error(self, kind: type[OSError] = ReportedByMain) -> Exception:
        """The exception to raise for it: an OSError of type `kind` with its errno, ValueError, or RuntimeError."""
        if self.number is not None:
            return kind(self.number, self.message, *([] if self.path is None else [self.path]))
        return ValueError(self.message) if self.is_value_error else RuntimeError(self.message)


def on_main(act: Callable[[], T], is_main: bool) -> T | None:
    """Call `act` on the main process alone; every process returns its result, or raises its error.

    Raises:
        OSError, ValueError: if `act` raises one, on every process; an OSError keeps its errno.
        RuntimeError: for any other error, on the other processes.
    """
    answer: list = [None, None]
    failure = None
    if is_main:
        try:
            answer[0] = act()
        except Exception as error:  # whatever it is, the other processes wait for the outcome
            failure, answer[1] = error, ErrorSummary.of(error)
    value, summary = broadcast_object_list(answer)
    if failure is not None:
        raise failure
    if summary is not None:
        raise summary.error()
    return value


def write_together(folder: Path, write: Callable[[Path], FileHashes | None]) -> None:
    """Like `checkpoint.write_folder`, with a `write` that every process calls; all of them see the same disk.

    The first process makes the temporary folder, all write their files into it, and then the first one writes the
    manifest and renames the folder. Each of these steps starts when all processes know that the previous one is done.

    Raises:
        OSError: on every process, with its errno, if a disk fails. Nothing is left behind.
        RuntimeError: on every process, for any other error.
    """
    if get_rank():
        on_main(_nothing, False)  # the temporary folder exists
        _written(checkpoint.temporary_folder(folder), write)
        on_main(_nothing, False)  # the folder was renamed
        return
    waiting = True  # whether the other processes wait for the outcome

    def share(temporary: Path) -> FileHashes:
        nonlocal waiting
        on_main(_nothing, True)
        waiting = False
        hashes = _written(temporary, write)
        waiting = True
        return hashes

    try:
        checkpoint.write_folder(folder, share)
    except Exception as error:
        if waiting:
            on_main(_raising(error), True)
        raise
    on_main(_nothing, True)


def save_rows(folder: Path, state: dict) -> FileHashes:
    """Write the rows of a state that this process holds, see `save_state`; returns the hash of the durable file."""
    path = checkpoint.save_state(folder, state, get_rank())
    return {path.name: durable_sha256(path)}


def _written(folder: Path, write: Callable[[Path], FileHashes | None]) -> FileHashes:
    """Write the files of all processes, and return their hashes; the first error, if any, is raised on all."""
    rank, hashes, failure = get_rank(), {}, None
    try:
        hashes = write(folder) or {}
    except Exception as error:
        failure = ErrorSummary.of(error)
    answers: list = [None] * get_world_size()
    all_gather_object(answers, (hashes, failure))
    for other, (_, error) in enumerate(answers):
        if error is not None:
            message = f"process {other}: {error.message}; existing checkpoints are intact"
            raise ErrorSummary(message, error.number, error.path, False).error(ReportedByMain if rank else OSError)
    return {name: value for hashes, _ in answers for name, value in hashes.items()}


def _nothing() -> None:
    """Report success."""


def _raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act
