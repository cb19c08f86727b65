"""Checkpoints that two processes write together: if one fails, all of them raise and none waits."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from stipple_core.files.checkpoint_folder import write_folder
from stipple_core.files.manifest import problem
from tests.helpers.training.many_processes import run_all

FAULTS = {  # rank and call that fails with a full disk
    "temporary folder": (0, "mkdir"),
    "rows of the first": (0, "save_state"),
    "rows of the second": (1, "save_state"),
    "manifest": (0, "write_manifest"),
    "rename": (0, "rename"),
}


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")


def outcome(act) -> list:
    """The errno and the type of the error that a call raises, or None."""
    try:
        act()
    except Exception as error:
        return [getattr(error, "errno", None), type(error).__name__, str(error)]
    return []


def write(folder: Path, rank: int, fault: str) -> list:
    """Write a checkpoint of rows with a fault; returns the error that this process gets."""
    import stipple_core.files.checkpoint_folder as checkpoint
    from stipple.training.distributed.collective import save_rows, write_together
    from stipple_core.files.training_state import Rows

    state = {"rows": Rows(torch.full((2, 3), float(rank)), 2 * rank, torch.Size([4, 3])), "step": 1}
    failing, call = FAULTS.get(fault, (None, ""))
    with pytest.MonkeyPatch.context() as patch:
        if failing == rank and call in ("mkdir", "rename"):
            patch.setattr(Path if call == "mkdir" else os, call, fail)
        elif failing == rank:
            patch.setattr(checkpoint, call, fail)
        return outcome(lambda: write_together(folder, lambda path: save_rows(path, state)))


def main(arguments: list[str]) -> None:
    """The program of each process, which writes its results to its own file."""
    from accelerate import PartialState

    from stipple.training.distributed.collective import on_main

    folder = Path(arguments[0].removeprefix("run="))
    state = PartialState(cpu=True)
    rank, main = state.process_index, state.is_main_process
    answers = {}
    for name in [*FAULTS, ""]:
        answers[name] = write(folder / "state" / "step-0000001", rank, name)
    answers["value"] = on_main(lambda: 5, main)
    answers["full"] = outcome(lambda: on_main(fail, main))
    answers["mistake"] = outcome(lambda: on_main(lambda: int("x"), main))
    Path(f"{folder}-{rank}.json").write_text(json.dumps(answers))
    state.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("together") / "run"
    write_folder(folder / "state" / "step-0000001", lambda path: (path / "old").write_text("old") and None)
    run_all([(2, {}, ["tests.training.test_together", f"run={folder}"])])
    return folder, [json.loads(Path(f"{folder}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_of_one_process_raises_an_error_with_its_errno_on_all(fault, answers):
    main, other = (each[fault] for each in answers[1])
    assert main[0] == other[0] == errno.ENOSPC
    assert main[1] == "OSError" and other[1] == "ReportedByMain"
    assert "No space left on device" in main[2] and "No space left on device" in other[2]


def test_after_all_faults_both_write_a_checkpoint_and_no_temporary_files_are_left(answers):
    folder, (first, second) = answers
    assert first[""] == second[""] == []
    assert [path.name for path in (folder / "state").iterdir()] == ["step-0000001"]
    assert problem(folder / "state" / "step-0000001") is None
    assert (folder / "state" / "step-0000001" / "state-1.safetensors").is_file()


def test_results_and_errors_of_the_main_process_reach_all(answers):
    _, (first, second) = answers
    assert first["value"] == second["value"] == 5
    assert first["full"][:2] == [errno.ENOSPC, "OSError"] and second["full"][:2] == [errno.ENOSPC, "ReportedByMain"]
    assert first["mistake"][1] == second["mistake"][1] == "ValueError" and first["mistake"][2] == second["mistake"][2]
