"""What all processes do together on one disk: all know what became of it, so that none waits for one that failed."""

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
Sums = dict[str, str]  # of files, by name, that a process made durable


class ReportedByMain(OSError):
    """A failure that the main process tells of; the others need not."""


@dataclass(frozen=True)
class ErrorSummary:
    """An error as one process tells it to the others."""

    told: str
    number: int | None  # the errno of an OSError
    place: str | None  # its file
    mistake: bool  # a ValueError: the user's

    @classmethod
    def of(cls, error: Exception) -> ErrorSummary:
        """The outline of an error."""
        if isinstance(error, OSError) and error.errno is not None:
            place = None if error.filename is None else str(error.filename)
            return cls(error.strerror or type(error).__name__, error.errno, place, False)
        return cls(str(error) or type(error).__name__, None, None, isinstance(error, ValueError))

    def error(self, kind: type[OSError] = ReportedByMain) -> Exception:
        """What to raise for it: an OSError of a `kind`, with its errno, where a disk failed."""
        if self.number is not None:
            return kind(self.number, self.told, *([] if self.place is None else [self.place]))
        return ValueError(self.told) if self.mistake else RuntimeError(self.told)


def on_main(act: Callable[[], T], is_main: bool) -> T | None:
    """Something that the main process alone does: what it returns or raises, on every process.

    Raises:
        OSError: on every process, with its errno, where the disk failed; so also ValueError. All else: RuntimeError.
    """
    answer: list = [None, None]
    failed = None
    if is_main:
        try:
            answer[0] = act()
        except Exception as error:  # whatever it is, the others are waiting to hear of it
            failed, answer[1] = error, ErrorSummary.of(error)
    value, problem = broadcast_object_list(answer)
    if failed is not None:
        raise failed
    if problem is not None:
        raise problem.error()
    return value


def write_together(folder: Path, write: Callable[[Path], Sums | None]) -> None:
    """As `checkpoint.write_folder`, with a `write` that every process calls; all of them see the same disk.

    The first process makes the temporary folder, all write their files into it, and when all have, the first one writes
    the manifest and renames the folder. Each of these steps is begun when all know that the one before was done.

    Raises:
        OSError: on every process, with its errno, where a disk failed; all else: RuntimeError. Nothing is left behind.
    """
    if get_rank():
        on_main(_nothing, False)  # the temporary folder is there
        _written(checkpoint.temporary_folder(folder), write)
        on_main(_nothing, False)  # and has its name
        return
    waiting = True  # whether the others are, to hear how it went

    def share(temporary: Path) -> Sums:
        nonlocal waiting
        on_main(_nothing, True)
        waiting = False
        sums = _written(temporary, write)
        waiting = True
        return sums

    try:
        checkpoint.write_folder(folder, share)
    except Exception as error:
        if waiting:
            on_main(_raising(error), True)
        raise
    on_main(_nothing, True)


def save_rows(folder: Path, state: dict) -> Sums:
    """What a process writes of a state: see `save_state`; its file is durable, and its sum returned by its name."""
    path = checkpoint.save_state(folder, state, get_rank())
    return {path.name: durable_sha256(path)}


def _written(folder: Path, write: Callable[[Path], Sums | None]) -> Sums:
    """The sums of the files that the processes wrote, by name; the first problem, if one had any, is raised on all."""
    rank, sums, problem = get_rank(), {}, None
    try:
        sums = write(folder) or {}
    except Exception as error:
        problem = ErrorSummary.of(error)
    answers: list = [None] * get_world_size()
    all_gather_object(answers, (sums, problem))
    for other, (_, found) in enumerate(answers):
        if found is not None:
            told = f"process {other}: {found.told}; what was there before is intact"
            raise ErrorSummary(told, found.number, found.place, False).error(ReportedByMain if rank else OSError)
    return {name: found for sums, _ in answers for name, found in sums.items()}


def _nothing() -> None:
    """All is well."""


def _raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act
