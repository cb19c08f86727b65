"""A checkpoint that all processes write, each its rows of what is sharded; the first one makes it whole or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed import all_gather_object, barrier, get_rank, get_world_size

from storage import checkpoint
from storage.manifest import durable_sum


def write_together(folder: Path, state: dict[str, Any]) -> None:
    """As `checkpoint.write_folder` of `save_state`, called by every process, all of which see the same disk.

    The first process makes the temporary folder, all write their file into it and make it durable, and when all have,
    the first one writes the manifest and renames the folder.

    Raises:
        RuntimeError: on every process, saying which could not write its rows and why; nothing is left behind.
    """

    def share(temporary: Path) -> dict[str, str]:
        barrier()  # the temporary folder is there
        return _written(temporary, state)

    if get_rank():
        share(checkpoint.temporary_folder(folder))
    else:
        checkpoint.write_folder(folder, share)


def _written(folder: Path, state: dict[str, Any]) -> dict[str, str]:
    """The sums of the files that the processes wrote, by name."""
    rank, sums, problem = get_rank(), {}, None
    try:
        path = checkpoint.save_state(folder, state, rank)
        sums = {path.name: durable_sum(path)}
    except Exception as error:  # whatever it is, the others are waiting to hear of it
        problem = f"process {rank}: {error}"
    answers: list[Any] = [None] * get_world_size()
    all_gather_object(answers, (sums, problem))
    problems = [problem for _, problem in answers if problem]
    if problems:
        raise RuntimeError(f"a checkpoint was not written ({'; '.join(problems)}); the one before it is intact")
    return {name: found for sums, _ in answers for name, found in sums.items()}
