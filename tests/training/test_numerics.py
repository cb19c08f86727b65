"""Steps with a NaN or an infinity are skipped: they change nothing, and are reported in one line."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stipple.training.bad_steps import BadSteps, Diverged
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.run.signals import Signals
from stipple.training.trainer import Trainer
from stipple_core.files.checkpoint_folder import checkpoints
from tests.helpers.training.line_runs import Run, at
from tests.helpers.training.run_files import assert_finite_on_disk, bad_steps, strict_json

BAD = [math.nan, math.inf, -math.inf, 1e25]  # the square of 1e25, a second moment, overflows float32
pytestmark = pytest.mark.usefixtures("settings_of_runs")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def normalized_line() -> nn.Module:
    """A model with buffers: the running mean and variance of a batch norm."""
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


def poison_a_gradient(run: Run, value: float, draws: random.Random) -> None:
    parameter = draws.choice(list(run.model.parameters()))
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient.index_fill(0, ZERO, value))[1])


ZERO = torch.tensor([0])


def test_fifty_injections_into_losses_and_gradients_change_no_weight(tmp_path, capsys):
    draws = random.Random(5)
    kinds = {"factor": BAD, "summand": BAD[:3], "gradient": BAD}  # a summand does not change the gradient
    chosen = {step: draws.choice(list(kinds)) for step in draws.sample(range(100), 50)}
    bad = {step: (kind, draws.choice(kinds[kind])) for step, kind in chosen.items()}
    run, before, last = Run(tmp_path, normalized_line, steps=100, micro_batch_size=4, max_bad_steps=50), {}, {}

    def numbers() -> list[Tensor]:
        return run.numbers() + [buffer.clone() for buffer in run.model.buffers()]

    def each(step: int, loss: Tensor) -> Tensor:
        if run.trainer.micro == 1:
            before[step] = numbers()[: -len(list(run.model.buffers()))] + last.get("buffers", [])
        kind, value = bad.get(step, ("", 0.0))
        if run.trainer.micro != step % 2 or not kind:
            return loss
        if kind == "gradient":
            poison_a_gradient(run, value, draws)
            return loss
        return loss * value if kind == "factor" else loss + value

    after, end = {}, run.trainer._end_step

    def noting(*arguments) -> None:
        after[run.trainer.step - 1], last["buffers"] = numbers(), [b.clone() for b in run.model.buffers()]
        end(*arguments)

    run.trainer._end_step = noting
    last["buffers"] = [buffer.clone() for buffer in run.model.buffers()]
    run.train(each)
    unchanged = [s for s in after if all(map(torch.equal, before[s], after[s])) and len(before[s]) == len(after[s])]
    assert unchanged == sorted(bad) and [line["step"] - 1 for line in bad_steps(tmp_path)] == unchanged
    assert run.ema.updates == 50
    assert_finite_on_disk(tmp_path)


def test_a_skipped_step_is_reported_with_the_samples_of_the_non_finite_micro_batch(tmp_path, capsys):
    run = Run(tmp_path, steps=5, micro_batch_size=2)
    run.train(lambda step, loss: loss * math.nan if step == 3 and run.trainer.micro == 1 else loss)
    (line,) = bad_steps(tmp_path)
    assert line == {"step": 4, "optimizer": "optimizer", "loss": "nan", "gradient_norm": "nan",
                    "samples": ["3/2", "3/3"]}  # fmt: skip
    message = "step 4: loss nan, gradient norm nan of optimizer; this update was skipped (samples: 3/2, 3/3)\n"
    assert message in capsys.readouterr().out


def test_if_only_a_gradient_is_not_finite_all_samples_of_the_step_are_named(tmp_path, capsys):
    run = Run(tmp_path, steps=5, micro_batch_size=4)
    run.train(at(3, lambda: poison_a_gradient(run, math.inf, random.Random(0))))
    (line,) = bad_steps(tmp_path)
    assert line["samples"] == [f"3/{j}" for j in range(8)] and math.isfinite(line["loss"])
    assert "3/3, 3/4 and 3 more)" in capsys.readouterr().out


def test_averages_of_metrics_skip_values_that_are_not_finite(tmp_path):
    run = Run(tmp_path, steps=4, micro_batch_size=4, log_every=2)
    losses = []

    def each(step: int, loss: Tensor) -> Tensor:
        losses.append(loss.item())
        run.trainer.log(half=math.nan if step == 0 else step, never=math.inf)
        return loss * math.nan if step == 3 else loss

    run.train(each)
    first, second = (strict_json(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["half"] == 1 and second["half"] == 2.5 and "never" not in first | second
    assert first["loss"] == pytest.approx(sum(losses[:4]) / 4)
    run.trainer.record(validation_loss=math.nan, validation_psnr=3.0)
    assert strict_json((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 5, "validation_psnr": 3.0}


def test_too_many_bad_steps_in_a_row_end_the_run_in_one_line_that_names_the_checkpoint(tmp_path, capsys):
    run = Run(tmp_path, steps=20, max_bad_steps=3)
    with pytest.raises(Diverged) as ended:
        run.train(lambda step, loss: loss * math.nan if step >= 6 else loss)
    assert ended.value.code == 1 and run.trainer.step == 8
    assert [path.name for path in checkpoints(tmp_path / "state")] == ["step-0000003", "step-0000006"]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "3 steps in a row were not finite" in errors[0] and "bad_steps.jsonl" in errors[0]
    assert f"the last good checkpoint is {tmp_path}/state/step-0000006;" in errors[0]
    assert_finite_on_disk(tmp_path)


def test_too_many_bad_steps_before_the_first_checkpoint_name_none(tmp_path, capsys):
    run = Run(tmp_path, max_bad_steps=2)
    with pytest.raises(Diverged):
        run.train(lambda step, loss: loss * math.nan)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "; there is no checkpoint yet; lower the learning rate, or look" in errors[0]


def test_a_good_step_resets_the_count_of_bad_ones(tmp_path):
    run = Run(tmp_path, max_bad_steps=3).train(lambda step, loss: loss if step in (2, 5) else loss * math.nan)
    assert run.trainer.step == 8 and run.ema.updates == 2


def test_bad_steps_in_a_row_are_counted_across_a_restart_and_reported_once(tmp_path):
    def nan_from_2(step: int, loss: Tensor) -> Tensor:
        return loss * math.nan if step >= 2 else loss

    with pytest.raises(ZeroDivisionError):
        Run(tmp_path, max_bad_steps=5, save_every=4).train(lambda s, loss: nan_from_2(s, loss) if s < 5 else 1 / 0)
    gc.collect()
    with pytest.raises(Diverged):
        Run(tmp_path, max_bad_steps=5, save_every=4).train(nan_from_2)
    assert [line["step"] for line in bad_steps(tmp_path)] == [3, 4, 5, 6, 7]


# -- fp16 --------------------------------------------------------------------------------------------------------------


def fp16_run(folder: Path, **settings) -> Run:
    """A run whose optimizer scales its losses, which accelerate only allows on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "optimizer", _scaled(Trainer.optimizer))
        return Run(folder, **settings)


def _scaled(make: Callable) -> Callable:
    def inner(trainer: Trainer, *arguments) -> Optimizer:
        config = trainer.config
        trainer.config = dataclasses.replace(config, precision="fp16")
        optimizer = make(trainer, *arguments)
        trainer.config = config
        return optimizer

    return inner


def overflowing(run: Run, largest: float) -> Callable[[int, Tensor], Tensor]:
    """Overflow gradients above a loss scale, as in float16."""

    def each(step: int, loss: Tensor) -> Tensor:
        if run.optimizer.scaler.get_scale() > largest:
            poison_a_gradient(run, math.inf, random.Random(0))
        return loss

    return each


def test_the_search_for_a_loss_scale_is_not_reported_as_bad_steps(tmp_path, capsys):
    run = fp16_run(tmp_path, steps=20, max_bad_steps=3)
    run.train(overflowing(run, 1024))
    assert run.optimizer.scaler.get_scale() == 1024 and run.ema.updates == 20 - 6
    assert bad_steps(tmp_path) == [] and "was skipped" not in capsys.readouterr().out


def test_overflows_count_when_the_loss_scale_can_not_be_halved(tmp_path):
    run = fp16_run(tmp_path, steps=40, max_bad_steps=3)
    with pytest.raises(Diverged):
        run.train(overflowing(run, 0))
    assert [line["step"] for line in bad_steps(tmp_path)] == [17, 18, 19]


def test_a_loss_that_is_not_finite_counts_under_fp16_too(tmp_path):
    with pytest.raises(Diverged):
        fp16_run(tmp_path, max_bad_steps=3).train(lambda step, loss: loss * math.nan)


def broken_off_at_7(folder: Path) -> None:
    run = fp16_run(folder)
    with pytest.raises(ZeroDivisionError):
        run.train(lambda step, loss: overflowing(run, 8192)(step, loss) if step < 7 else 1 / 0)


def test_the_loss_scale_is_saved_and_restored(tmp_path):
    whole = fp16_run(tmp_path / "whole")
    whole.train(overflowing(whole, 8192))
    broken_off_at_7(tmp_path / "run")
    gc.collect()
    again = fp16_run(tmp_path / "run")
    assert again.trainer.step == 6 and again.optimizer.scaler.get_scale() == 8192
    again.train(overflowing(again, 8192))
    assert again.optimizer.scaler.state_dict() == whole.optimizer.scaler.state_dict()
    assert all(map(torch.equal, again.numbers(), whole.numbers()))


# -- one wait for the device per step ----------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts how many times a number is read from a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_whether_a_step_is_finite_is_read_from_the_device_once():
    guard = BadSteps(None, torch.device("cpu"), 1, 3)
    for loss, passes in ((1.0, True), (math.nan, False)):
        guard.begin([])
        guard.add_loss("optimizer", torch.tensor(loss))
        with Reads() as reads:
            assert guard.passes("optimizer", torch.tensor(1.0)) == passes
        assert reads.count == 1 and guard.step_skipped != passes


def test_the_requests_of_processes_are_read_from_the_device_together(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda answer, operation: answer.fill_(143))
    signals = Signals()
    try:
        with Reads() as reads:
            request = signals.request(False, torch.device("cpu"), 2)
    finally:
        signals.close()
    assert request.save and request.exit_code == 143 and reads.count == 0  # but as a list
