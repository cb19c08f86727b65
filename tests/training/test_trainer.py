"""The trainer, with a model of a few numbers."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from stipple.training.run_state import RunState
from stipple.training.trainer import Trainer
from stipple.training.trainer_config import TrainerConfig
from stipple_core.files.checkpoint_folder import checkpoints, write_folder
from stipple_core.files.training_state import Rows, open_state, save_state
from tests.helpers.training.line_runs import OPTIMIZER, Run, at
from tests.helpers.training.tiny_runs import metrics


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # only needed if the machine crashes


def equal(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.numbers(), b.numbers(), strict=True))


def saved(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(folder / "state")]


def crash() -> None:
    raise KeyboardInterrupt("pulled the plug")


def exit_code(run: Run, **arguments) -> int:
    """Train a run to its exit code, and release its lock."""
    try:
        run.train(**arguments)
    except SystemExit as stopped:
        return stopped.code
    raise AssertionError("the run went to its end")


def break_off(folder: Path, step: int, **settings) -> None:
    """End a run at `step` without saving, as SIGKILL would."""
    with pytest.raises(KeyboardInterrupt):
        Run(folder, **settings).train(at(step, crash))
    gc.collect()  # releases its lock


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_micro_batches_equal_one_big_batch(micro, tmp_path):
    whole = Run(tmp_path / "whole").train()
    parts = Run(tmp_path / "parts", micro_batch_size=micro).train()
    assert parts.batches == 8 // micro * whole.batches
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(whole.numbers(), parts.numbers(), strict=True)
    )
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_learning_rate_and_average_count_optimizer_steps_not_micro_batches(tmp_path):
    run = Run(tmp_path, micro_batch_size=2).train()
    assert run.rates[3::4] == [OPTIMIZER.rate(step, 8) for step in range(8)]
    assert run.ema.updates == 8 and run.trainer.step == 8


def test_positions_are_those_in_the_global_batch(tmp_path):
    run, found = Run(tmp_path, micro_batch_size=4, steps=2), []
    run.train(lambda step, loss: (found.append(run.trainer.positions()), loss)[1])
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_code_and_the_run_is_resumed_exactly(number, tmp_path):
    before = signal.getsignal(number)
    whole = Run(tmp_path / "whole").train()
    code = exit_code(Run(tmp_path / "run"), each=at(3, lambda: os.kill(os.getpid(), number)))
    assert code == 128 + number and saved(tmp_path / "run") == [3, 4]
    again = Run(tmp_path / "run")
    assert again.trainer.step == 4 and equal(again.train(), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert signal.getsignal(number) == before


def test_a_requested_checkpoint_is_saved_at_the_end_of_the_step(tmp_path):
    whole, found = Run(tmp_path / "whole").train(), {}
    run = Run(tmp_path / "run")

    def each(step: int, loss: torch.Tensor) -> torch.Tensor:
        found[step] = saved(tmp_path / "run")
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    assert equal(run.train(each), whole)
    assert found[3] == [3] and found[4] == [3, 4] and found[5] == [3, 4] and found[6] == [4, 6]


@pytest.mark.parametrize("numbers", [[signal.SIGUSR1], [signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM]])
@pytest.mark.parametrize("step", [2, 7])
def test_a_step_is_saved_once_for_any_number_of_reasons(step, numbers, tmp_path, monkeypatch):
    run, written = Run(tmp_path), []
    monkeypatch.setattr(run.trainer, "save", lambda save_model: written.append(run.trainer.step))
    with contextlib.suppress(SystemExit):
        run.train(at(step, lambda: [os.kill(os.getpid(), number) for number in numbers]))
    assert written.count(step + 1) == 1


def test_a_second_signal_ends_the_process_at_once_without_saving(tmp_path):
    child = os.fork()
    if not child:
        Run(tmp_path).train(at(4, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143 and saved(tmp_path) == [3]


def test_a_run_out_of_time_saves_and_exits_with_0_and_can_be_resumed(tmp_path):
    whole = Run(tmp_path / "whole", steps=3).train()
    for step in (1, 2):
        assert exit_code(Run(tmp_path / "run", steps=3, max_minutes=0)) == 0
        assert saved(tmp_path / "run")[-1] == step
    assert equal(Run(tmp_path / "run", steps=3, max_minutes=0).train(), whole)


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_run_killed_at_any_step_and_resumed_equals_an_uninterrupted_one(step, log_every, tmp_path):
    settings = {"micro_batch_size": 4, "log_every": log_every}
    whole = Run(tmp_path / "whole", **settings).train()
    break_off(tmp_path / "run", step, **settings)
    assert equal(Run(tmp_path / "run", **settings).train(), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert saved(tmp_path / "run") == saved(tmp_path / "whole") == [6, 8]


def test_metrics_after_the_checkpoint_are_removed_on_resume(tmp_path):
    break_off(tmp_path, 5)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # cut short by a crash
    Run(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_one_before(tmp_path, capsys):
    whole = Run(tmp_path / "whole").train()
    break_off(tmp_path / "run", 7)
    os.truncate(tmp_path / "run" / "state" / "step-0000006" / "state.safetensors", 100)
    again = Run(tmp_path / "run")
    assert again.trainer.step == 3 and "step-0000006 is not used: state.safetensors" in capsys.readouterr().err
    assert equal(again.train(), whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    Run(tmp_path).train()
    for path in checkpoints(tmp_path / "state"):
        (path / "state.safetensors").write_bytes(b"x")
    gc.collect()
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* is valid; .*--no-re"):
        Run(tmp_path)
    assert saved(tmp_path) == [6, 8]
    gc.collect()
    assert Run(tmp_path, resume=False).trainer.step == 0


@pytest.mark.parametrize("name", ["state", "model"])
def test_a_file_with_the_name_of_a_folder_of_the_run_is_refused_and_unchanged(name, tmp_path):
    (tmp_path / name).write_text("mine")
    for resume in (True, False):
        with pytest.raises(ValueError, match=f"{name} is a file, and a run needs a folder there; remove it"):
            Run(tmp_path, resume=resume)
        gc.collect()
    assert (tmp_path / name).read_text() == "mine"


def test_no_resume_removes_the_checkpoints_of_the_run_before(tmp_path):
    """Otherwise, early checkpoints of the new run would be pruned as older than those."""
    Run(tmp_path).train()
    break_off(tmp_path, 4, resume=False)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4] and saved(tmp_path) == [3]
    assert Run(tmp_path).trainer.step == 3


def test_a_run_killed_between_its_last_checkpoint_and_its_model_is_finished_when_it_is_resumed(tmp_path):
    def save_model(folder: Path) -> None:
        crash() if saved(tmp_path) == [3, 6, 8] else (folder / "weights").write_text("old")

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).train(save_model=save_model)
    gc.collect()
    assert (tmp_path / "model" / "weights").read_text() == "old"
    Run(tmp_path).train(save_model=lambda folder: (folder / "weights").write_text("whole"))
    assert (tmp_path / "model" / "weights").read_text() == "whole" and saved(tmp_path) == [6, 8]


def test_a_folder_in_use_is_refused_to_a_second_run(tmp_path):
    first = Run(tmp_path)
    with pytest.raises(ValueError, match=r"is in use by another run, process \d+ on \S+; wait for it"):
        Run(tmp_path)
    assert first.train().trainer.step == 8


@pytest.mark.parametrize(("batch", "micro", "multiple"), [(8, 3, 3), (10, 4, 4), (4, 8, 8)])
def test_batch_sizes_that_do_not_divide_and_unknown_precisions_are_refused(batch, micro, multiple, tmp_path):
    message = (
        f"trainer.batch_size {batch} is not a multiple of 1 processes x micro_batch_size {micro}; use {multiple} or"
    )
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, batch_size=batch, micro_batch_size=micro)
    with pytest.raises(ValueError, match="trainer.precision 'fp8' is unknown; use no, bf16 or fp16"):
        Run(tmp_path, precision="fp8")
    with pytest.raises(ValueError, match="trainer.timeout_minutes 0 must be above 0 and .*; use 60"):
        Run(tmp_path, timeout_minutes=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", [{"step": 3}, {}])
def test_a_valid_checkpoint_that_is_not_of_a_run_is_refused_in_one_line(state, tmp_path):
    write_folder(tmp_path / "state" / "step-0000003", lambda folder: save_state(folder, state))
    with pytest.raises(ValueError, match="step-0000003 is not the state of a run; remove it"):
        Run(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_by_the_part_that_does_not_fit(tmp_path):
    Run(tmp_path, steps=1).train()
    for model, message in (
        (nn.Linear(3, 1), r"weight is \[1, 3\] in the run, \[1, 2\] in it"),
        (nn.Linear(2, 1, bias=False), r"bias is not in the run, \[1\] in it"),
        (nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]), r"0.weight is \[2, 2\] in the run, not in it; .*; and 3"),
    ):
        fits = rf"step-0000001 is of another configuration \(model does not fit: {message}"
        with pytest.raises(ValueError, match=fits) as refused:
            Run(tmp_path, lambda model=model: model.double(), steps=2)
        assert "\n" not in str(refused.value)
        gc.collect()


def test_parts_that_only_the_checkpoint_or_only_the_run_has_are_named(tmp_path):
    Run(tmp_path, steps=1).train()
    trainer = Trainer(TrainerConfig(steps=2), tmp_path, {})
    trainer.network("model", nn.Linear(2, 1).double())
    trainer.network("critic", nn.Linear(2, 1))
    message = "critic is only in the run, optimizer is only in it, optimizer_ema0 is only in it"
    with pytest.raises(
        ValueError, match=rf"step-0000001 is of another configuration \({message}\); choose another `run`"
    ):
        trainer.resume()


def test_a_checkpoint_with_missing_rows_is_reported_as_incomplete(tmp_path):
    whole = {"weights": Rows(torch.ones(2, 3), 0, torch.Size([4, 3]))}  # the other rows are missing
    save_state(tmp_path, {"model": whole})
    with pytest.raises(
        ValueError, match=r"is incomplete \(rows 2 to 3 of /model/weights are in no file\); remove it"
    ) as caught:
        RunState(model=nn.Linear(3, 4)).load_state_dict(open_state(tmp_path), tmp_path)
    assert "--no-resume" not in str(caught.value)


@pytest.mark.parametrize(("setting", "message"), [({"keep": 1}, "keep 1"), ({"keep": -1}, "keep -1"),
                                               ({"max_minutes": -1}, "max_minutes -1")])  # fmt: skip
def test_settings_out_of_range_are_refused(setting, message, tmp_path):
    with pytest.raises(ValueError, match=f"trainer.{message} must be at least [02]"):
        Run(tmp_path, **setting)


def test_a_finished_run_that_is_started_again_writes_its_model_only_if_that_is_incomplete(tmp_path):
    written = []

    def save_model(folder: Path) -> None:
        written.append(folder)
        (folder / "weights").write_text("whole")

    Run(tmp_path).train(save_model=save_model)
    weights, count = tmp_path / "model" / "weights", len(written)
    Run(tmp_path).train(save_model=save_model)
    assert len(written) == count
    weights.write_text("wrong")
    Run(tmp_path).train(save_model=save_model)
    assert len(written) == count + 1 and weights.read_text() == "whole"


def test_the_time_limit_starts_when_the_trainer_is_constructed(tmp_path, monkeypatch):
    run, now = Run(tmp_path, max_minutes=1), time.monotonic()
    monkeypatch.setattr(
        "stipple.training.trainer.time.monotonic", lambda: now + 61
    )  # the time that the data check took
    assert exit_code(run) == 0 and run.trainer.step == 1


def test_a_checkpoint_requested_before_the_loop_is_written_after_the_first_step(tmp_path):
    run, found = Run(tmp_path), {}
    os.kill(os.getpid(), signal.SIGUSR1)
    run.train(lambda step, loss: (found.update({step: saved(tmp_path)}), loss)[1])
    assert found[0] == [] and found[1] == [1] and found[2] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_requested_before_the_loop_ends_the_run_at_once_without_a_traceback(number, tmp_path, capfd):
    child = os.fork()
    if not child:
        run = Run(tmp_path)
        os.kill(os.getpid(), number)
        os._exit(run.trainer.step)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    assert "Traceback" not in capfd.readouterr().err and saved(tmp_path) == []


def test_signal_handlers_are_restored_for_any_order_of_runs(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    first, second = Run(tmp_path / "a"), Run(tmp_path / "b")
    assert (
        exit_code(first, each=at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))) == 143
    )  # although the second run is newer
    assert exit_code(second, each=at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))) == 143
    Run(tmp_path / "c")  # never trained
    gc.collect()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_folder_that_is_locked_for_a_while_is_removed_unless_something_was_written(tmp_path):
    run = tmp_path / "runs" / "run"
    trainer, other = (Trainer(TrainerConfig(steps=2), run, {}) for _ in range(2))
    with trainer.holding_folder(), pytest.raises(ValueError, match="is in use by another run"):
        other.resume()
    assert list(tmp_path.iterdir()) == []
    with trainer.holding_folder():
        (run / "verified-0.jsonl").write_text("")
    with pytest.raises(ValueError, match="is in use by another run"):
        other.resume()
    trainer.resume()


def test_buffers_of_a_skipped_step_are_restored_before_anything_is_measured(tmp_path):
    run = Run(tmp_path, lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double(), steps=2)
    before, seen = [b.clone() for b in run.model.buffers()], []
    for points in run.trainer.steps(run.loader()):
        loss = run.network(points.x).mean()
        run.trainer.update(loss * math.nan if run.trainer.step == 0 else loss, run.optimizer)
        seen.append(all(map(torch.equal, run.model.buffers(), before)))  # as a validation would see them
    assert seen == [True, False]
