"""The machinery around a training step, on a model of a few numbers: what it promises whoever writes a loop."""

from __future__ import annotations

import gc
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import metrics
from torch import nn

from storage.checkpoint import checkpoints
from training.ema import Ema, EmaConfig
from training.optimizer import OptimizerConfig, learning_rate
from training.trainer import Trainer, TrainerConfig

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=3, schedule="cosine", clip_norm=1.0)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a process that dies loses nothing by it; a machine would


class Run:
    """A run on the line y = 3 x_0 - 2 x_1: batch `step`, sample `j` is drawn from its own seed."""

    def __init__(self, folder: Path, **settings):
        config = TrainerConfig(**{"steps": 8, "batch_size": 8, "save_every": 3, "log_every": 1, **settings})
        self.trainer = Trainer(config, folder, {"trainer": {"steps": config.steps}})
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1).double()
        network = self.trainer.network("model", self.model)
        self.ema = Ema(self.model, EmaConfig())
        self.optimizer = self.trainer.optimizer("optimizer", [self.model], OPTIMIZER, [self.ema])
        self.trainer.resume()
        self.network, self.rates, self.batches = network, [], 0

    def loader(self):
        first, config = self.trainer.step, self.trainer.config
        for step in range(first, config.steps):
            for micro in range(self.trainer.accumulation):
                positions = range(micro * self.trainer.micro_batch_size, (micro + 1) * self.trainer.micro_batch_size)
                draws = [torch.Generator().manual_seed(1000 * step + j) for j in positions]
                yield torch.stack([torch.randn(2, dtype=torch.float64, generator=g) for g in draws])

    def train(self, each=lambda step, loss: loss, save_model=None) -> Run:
        """Train to the end; `each` may change a loss, or do something at a step."""
        for x in self.trainer.steps(self.loader(), save_model):
            y = x @ torch.tensor([3.0, -2.0], dtype=torch.float64)
            loss = (self.network(x)[:, 0] - y).square().mean()
            self.trainer.update(each(self.trainer.step, loss), self.optimizer)
            self.rates.append(self.optimizer.adamw.param_groups[0]["lr"])
            self.trainer.log(loss=loss)
            self.batches += 1
        return self

    def numbers(self) -> list[torch.Tensor]:
        """Weights, averages and moments."""
        moments = [value for state in self.optimizer.adamw.state.values() for value in state.values()]
        return [value.detach().clone() for value in [*self.model.parameters(), *self.ema.averages.values(), *moments]]


def equal(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.numbers(), b.numbers(), strict=True))


def saved(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(folder / "state")]


def at(wanted: int, action):
    """For `Run.train`: do something at a step, before its update."""

    def each(step: int, loss: torch.Tensor) -> torch.Tensor:
        if step == wanted:
            action()
        return loss

    return each


def crash() -> None:
    raise KeyboardInterrupt("pulled the plug")


def exit_code(run: Run, **arguments) -> int:
    """What the process would exit with; nothing of the run is held afterwards."""
    try:
        run.train(**arguments)
    except SystemExit as stopped:
        return stopped.code
    raise AssertionError("the run went to its end")


def break_off(folder: Path, step: int, **settings) -> None:
    """A run that is gone at `step` with nothing said or saved, as after SIGKILL."""
    with pytest.raises(KeyboardInterrupt):
        Run(folder, **settings).train(at(step, crash))
    gc.collect()  # it holds its lock until it is collected


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
    assert run.rates[3::4] == [learning_rate(OPTIMIZER, step, 8) for step in range(8)]
    assert run.ema.updates == 8 and run.trainer.step == 8


def test_positions_number_the_samples_of_the_global_batch(tmp_path):
    run, found = Run(tmp_path, micro_batch_size=4, steps=2), []
    run.train(lambda step, loss: (found.append(run.trainer.positions()), loss)[1])
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_weights_average_and_moments_untouched(bad, tmp_path, capsys):
    run, seen = Run(tmp_path, steps=5), []

    def each(step: int, loss: torch.Tensor) -> torch.Tensor:
        seen.append(run.numbers())
        return loss * bad if step == 3 else loss

    run.train(each)
    same = [all(torch.equal(a, b) for a, b in zip(seen[i], seen[i + 1], strict=True)) for i in (2, 3)]
    assert same == [False, True] and run.ema.updates == 4
    said = capsys.readouterr().out
    assert said.startswith("step 4: gradient norm") and said.endswith("this update was left out\n")


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_checkpoint_intact(tmp_path):
    run = Run(tmp_path, steps=20, max_bad_steps=3)
    with pytest.raises(RuntimeError, match="3 steps in a row had no finite gradient.*lower the learning rate"):
        run.train(lambda step, loss: loss * math.nan if step >= 6 else loss)
    assert run.trainer.step == 8 and saved(tmp_path) == [3, 6]


def test_a_good_step_starts_the_count_of_bad_ones_anew(tmp_path):
    run = Run(tmp_path, max_bad_steps=3).train(lambda step, loss: loss if step in (2, 5) else loss * math.nan)
    assert run.trainer.step == 8 and run.ema.updates == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_code_and_the_run_goes_on_as_if_uninterrupted(number, tmp_path):
    before = signal.getsignal(number)
    whole = Run(tmp_path / "whole").train()
    code = exit_code(Run(tmp_path / "run"), each=at(3, lambda: os.kill(os.getpid(), number)))
    assert code == 128 + number and saved(tmp_path / "run") == [3, 4]
    again = Run(tmp_path / "run")
    assert again.trainer.step == 4 and equal(again.train(), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert signal.getsignal(number) == before


def test_a_run_out_of_time_saves_and_exits_0_and_goes_on_when_started_again(tmp_path):
    whole = Run(tmp_path / "whole", steps=3).train()
    for step in (1, 2):
        assert exit_code(Run(tmp_path / "run", steps=3, max_minutes=0)) == 0
        assert saved(tmp_path / "run")[-1] == step
    assert equal(Run(tmp_path / "run", steps=3, max_minutes=0).train(), whole)


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_run_broken_off_at_any_step_and_started_again_equals_one_that_was_not(step, log_every, tmp_path):
    settings = {"micro_batch_size": 4, "log_every": log_every}
    whole = Run(tmp_path / "whole", **settings).train()
    break_off(tmp_path / "run", step, **settings)
    assert equal(Run(tmp_path / "run", **settings).train(), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert saved(tmp_path / "run") == saved(tmp_path / "whole") == [6, 8]


def test_metrics_written_after_the_checkpoint_are_taken_back_on_resume(tmp_path):
    break_off(tmp_path, 5)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # cut short by a crash
    Run(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, capsys):
    whole = Run(tmp_path / "whole").train()
    break_off(tmp_path / "run", 7)
    os.truncate(tmp_path / "run" / "state" / "step-0000006" / "state.safetensors", 100)
    again = Run(tmp_path / "run")
    assert again.trainer.step == 3 and "step-0000006 is not used: state.safetensors" in capsys.readouterr().err
    assert equal(again.train(), whole)


def test_a_run_begun_anew_forgets_the_one_before_it(tmp_path):
    """Else the new run's early checkpoints would be pruned as older than those of the run that it replaces."""
    Run(tmp_path).train()
    break_off(tmp_path, 4, resume=False)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4] and saved(tmp_path) == [3]
    assert Run(tmp_path).trainer.step == 3


def test_a_run_killed_between_its_last_state_and_its_model_is_finished_on_restart(tmp_path):
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
    with pytest.raises(ValueError, match="is in use by another run; wait for it or choose another `run`"):
        Run(tmp_path)
    assert first.train().trainer.step == 8


@pytest.mark.parametrize(("batch", "micro", "mend"), [(8, 3, 3), (10, 4, 4), (4, 8, 8)])
def test_batch_sizes_that_do_not_divide_and_unknown_precisions_are_refused_with_the_mend(batch, micro, mend, tmp_path):
    message = f"trainer.batch_size {batch} is not a multiple of 1 processes x micro_batch_size {micro}; use {mend} or"
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, batch_size=batch, micro_batch_size=micro)
    with pytest.raises(ValueError, match="trainer.precision 'fp8' is unknown; use no, bf16 or fp16"):
        Run(tmp_path, precision="fp8")


def test_a_checkpoint_of_another_model_is_refused_by_the_part_that_does_not_fit(tmp_path):
    Run(tmp_path, steps=1).train()
    trainer = Trainer(TrainerConfig(steps=2), tmp_path, {})
    trainer.network("model", nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"step-0000001 is of another configuration \(model does not fit"):
        trainer.resume()
