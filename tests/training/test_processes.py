"""Runs of real processes: signals to any of them, the death of one, and results that do not depend on their number."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoencoder import Autoencoder, AutoencoderConfig
from stipple_core.files.checkpoint_folder import checkpoints
from tests.helpers.training.line_runs import OPTIMIZER, Run
from tests.helpers.training.tiny_runs import ROOT, STAGE_1, STAGE_2, differing, launch, losses, metrics, run_here, start

pytestmark = pytest.mark.usefixtures("settings_of_runs")
LINE = "tests/helpers/training/line_runs.py"
STEPS = 120


@pytest.fixture(scope="module", autouse=True)
def _scripts_of_tests_find_the_rooms(settings_of_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def lines(run: Path) -> int:
    """The number of lines that the run has written."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saved(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(run / "state")]


def rank_of(launcher: int, rank: int) -> int:
    """The process id of a rank below a launcher."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no rank {rank} below {launcher}")


def quiet() -> dict[str, int]:
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def test_sigusr1_saves_and_continues_and_sigterm_saves_and_exits_with_143(tmp_path):
    process = start(LINE, str(tmp_path), "steps=10000", "save_every=10000", "pause=0.01", **quiet())
    wait_for(lambda: lines(tmp_path) >= 3)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: len(saved(tmp_path)) == 1)
    written = lines(tmp_path)
    wait_for(lambda: lines(tmp_path) > written + 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert len(saved(tmp_path)) == 2 and saved(tmp_path)[-1] == metrics(tmp_path)[-1]["step"]


@dataclass(frozen=True)
class Broken:
    """A run of two processes, one of which got SIGUSR1 and was killed later; then the run was resumed."""

    folder: Path
    after_usr1: list[int]  # checkpoints after only the second process got SIGUSR1
    lines_after: int  # lines written afterwards
    code: int  # of the launcher
    seconds: float  # from the death of one process to the end of all


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Broken:
    folder = tmp_path_factory.mktemp("two") / "run"
    command = [LINE, str(folder), f"steps={STEPS}", "save_every=1000"]
    process = start(*command, "pause=0.05", processes=2, **quiet())
    wait_for(lambda: lines(folder) >= 3)
    second = rank_of(process.pid, 1)
    os.kill(second, signal.SIGUSR1)
    wait_for(lambda: len(saved(folder)) == 1)
    before, after_usr1 = lines(folder), saved(folder)
    wait_for(lambda: lines(folder) > before + 3)
    lines_after = lines(folder) - before
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    code = process.wait(60)
    seconds = time.monotonic() - killed
    Run(
        folder, steps=STEPS, save_every=1000, micro_batch_size=4
    ).train()  # in one process, because a launch takes 15 seconds
    return Broken(folder, after_usr1, lines_after, code, seconds)


def test_all_processes_save_at_the_same_step_and_continue_when_one_gets_sigusr1(broken):
    assert len(broken.after_usr1) == 1 and 3 <= broken.after_usr1[0] < STEPS and broken.lines_after > 3


def test_the_death_of_one_process_soon_ends_all_with_a_nonzero_exit_code(broken):
    print(f"ended {broken.seconds:.1f} s after the death")
    assert broken.code != 0 and broken.seconds < 30


def test_a_run_of_two_processes_that_is_resumed_by_one_equals_a_run_of_one_process(broken, tmp_path):
    Run(tmp_path / "run", steps=STEPS, save_every=1000, micro_batch_size=4).train()
    assert metrics(broken.folder) == metrics(tmp_path / "run")
    last = f"state/step-{STEPS:07d}"
    assert saved(broken.folder)[-1] == STEPS and differing(broken.folder / last, tmp_path / "run" / last) == []


def test_the_learning_rate_counts_optimizer_steps_for_any_number_of_processes(broken):
    rates = [line["rate"] for line in metrics(broken.folder)]
    assert rates == pytest.approx([OPTIMIZER.rate(step, STEPS) for step in range(STEPS)], rel=1e-6)


# -- longer runs of both stages --------------------------------------------------------------------------------------

LONG = ["trainer.steps=50", "trainer.save_every=20", "validation.every=25", "trainer.log_every=1"]
TRAININGS = {
    "kl": [*STAGE_1, *LONG, "discriminator_start=10"],
    "vq": [*STAGE_1, *LONG, "discriminator_start=10", "autoencoder.regularizer=vq", "revive_every=10"],
    "stage 2": [*STAGE_2, *LONG, "data.flip=true", "data.crop=random", "samples.every=25"],
}


@pytest.fixture(scope="module", params=TRAININGS)
def training(request, tmp_path_factory) -> tuple[list[str], Path]:
    """A command without its `run=`, and the folder of its run on one process with two micro-batches per step."""
    folder = tmp_path_factory.mktemp("training")
    config = AutoencoderConfig(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=32)
    Autoencoder(config).save(folder / "autoencoder")
    command = TRAININGS[request.param] + [f"autoencoder={folder}/autoencoder"] * (request.param == "stage 2")
    command.append("trainer.micro_batch_size=2")
    run_here(*command, f"run={folder / 'run'}")
    return command, folder / "run"


def assert_same(run: Path, whole: Path) -> None:
    assert len(losses(run)) == 50 and losses(run) == losses(whole)
    assert differing(run / "state/step-0000050", whole / "state/step-0000050") == []
    assert differing(run / "model", whole / "model") == []


@pytest.mark.slow
def test_two_processes_train_50_steps_bit_for_bit_like_one_with_two_micro_batches(training, tmp_path):
    command, whole = training
    launch(*command, f"run={tmp_path / 'run'}", processes=2)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_continues_bit_for_bit_from_two_processes_to_one_to_two(training, tmp_path):
    command, whole = training
    run = tmp_path / "run"
    for processes, reached in ((2, 13), (0, 29)):
        process = start(*command, f"run={run}", processes=processes, **quiet())
        wait_for(lambda reached=reached: len(losses(run)) >= reached if lines(run) else False, 120)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        print(f"stopped at step {saved(run)[-1]}")
        assert reached <= saved(run)[-1] < 50
    launch(*command, f"run={run}", processes=2)
    assert_same(run, whole)
