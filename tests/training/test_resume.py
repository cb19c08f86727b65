"""A run that is interrupted at any event and resumed equals an uninterrupted one, bit for bit.

The events are drawn from a seed that is printed, and so shown where a test fails; STIPPLE_SEED sets it. Processes are
killed in `test_kills.py`.
"""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path

import pytest

from stipple.training.run.metrics import Metrics
from stipple.training.trainer import Trainer
from stipple_core.files import checkpoint_folder as checkpoint
from tests.helpers.training.many_processes import succeed
from tests.helpers.training.tiny_runs import STAGE_1, STAGE_2, differing, files, metrics, run_here

# 36 images in batches of 10: most steps are inside an epoch, and one in four crosses its end
SCHEDULE = ["trainer.batch_size=10", "trainer.micro_batch_size=5", "trainer.log_every=2", "trainer.save_every=3"]
CASES = {
    "stage 1, kl": [*STAGE_1, *SCHEDULE],
    "stage 1, vq": [*STAGE_1, *SCHEDULE, "autoencoder.regularizer=vq"],
    "stage 1, linear start, muon": [
        *(*STAGE_1, *SCHEDULE, "linear_start=12", "patch=16", "autoencoder.norm_num_groups=4"),
        *("optimizer.kind=muon", "optimizer.schedule=wsd", "optimizer.decay_steps=3", "loss.colors=[1,1.5,3]"),
    ],
    "stage 2": [*STAGE_2, *SCHEDULE, "data.flip=true", "data.crop=random"],
}


class Killed(BaseException):
    """Ends a run in this process, as SIGKILL would end its own process."""


pytestmark = pytest.mark.usefixtures("settings_of_runs")


@pytest.fixture
def draws() -> random.Random:
    seed = int(os.environ.get("STIPPLE_SEED") or time.time_ns() % 2**32)
    print(f"STIPPLE_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, autoencoder) -> tuple[list[str], Path]:
    """A command without its `run=`, and the folder of its uninterrupted run."""
    command = CASES[request.param] + [f"autoencoder={autoencoder}"] * (request.param == "stage 2")
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*command, f"run={folder}")
    return command, folder


def assert_same(run: Path, whole: Path) -> None:
    """Compare weights, averages, moments, model folder, sample images and metrics."""
    assert metrics(run) == metrics(whole)
    for part in ("state", "model", "samples"):
        assert differing(run / part, whole / part) == []


def die_at(n: int, patch: pytest.MonkeyPatch) -> list[str]:
    """End the run at the n-th event (from 0): an update, a line of metrics, a state, a model, or a rename."""
    events: list[str] = []

    def mortal(owner, name):
        call = getattr(owner, name)

        def inner(*arguments, **options):
            events.append(name)
            if len(events) > n:
                raise Killed(name)
            return call(*arguments, **options)

        patch.setattr(owner, name, inner)

    for owner, name in [
        (Trainer, "update"), (Metrics, "write"), (checkpoint, "save_state"), (checkpoint, "write_folder"),
        (checkpoint, "prune"), (os, "rename"),
    ]:  # fmt: skip
        mortal(owner, name)
    return events


def test_a_run_killed_at_random_events_equals_an_uninterrupted_one(case, draws, tmp_path):
    command, whole = case
    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            events = die_at(draws.randrange(70), patch)
            try:
                run_here(*command, f"run={tmp_path / 'run'}")
            except Killed:
                print(f"killed at event {len(events)}, {events[-1]}")
            gc.collect()  # releases the lock of the trainer
    run_here(*command, f"run={tmp_path / 'run'}")
    assert_same(tmp_path / "run", whole)


def stop_after_one_step(command: list[str], run: Path) -> None:
    try:
        run_here(*command, f"run={run}", "trainer.max_minutes=0")
    except SystemExit as stopped:
        assert stopped.code == 0
    gc.collect()


TWICE = [pytest.param(name, marks=[] if name == "stage 2" else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("case", TWICE, indirect=True)
def test_a_run_of_one_process_is_resumed_by_two_bit_for_bit(case, tmp_path):
    command, whole = case
    stop_after_one_step(command, tmp_path / "run")
    succeed(*command, f"run={tmp_path / 'run'}", processes=2)
    assert metrics(tmp_path / "run")[-1]["loss"] == metrics(whole)[-1]["loss"]
    assert differing(tmp_path / "run" / "state" / "step-0000008", whole / "state" / "step-0000008") == []


def test_a_trained_text_encoder_keeps_its_tokenizer_when_the_captions_change(autoencoder, tmp_path):
    command, run = [*STAGE_2, f"autoencoder={autoencoder}", f"run={tmp_path}"], tmp_path
    stop_after_one_step(command, run)
    before = files(run / "model" / "tokenizer")
    run_here(*command, f"run={run}", "trainer.steps=2", "data.captions=['{text}','{keywords}']")
    assert metrics(run)[-1]["step"] == 2 and files(run / "model" / "tokenizer") == before


def test_a_changed_architecture_is_refused_in_one_line_and_the_run_is_unchanged(autoencoder, tmp_path, capsys):
    command = [*STAGE_2, f"autoencoder={autoencoder}", f"run={tmp_path}"]
    stop_after_one_step(command, tmp_path)
    before = files(tmp_path / "state")
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        run_here(*command, "unet.layers_per_block=2")
    assert refused.value.code == 2 and files(tmp_path / "state") == before
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "is of another configuration (unet" in message
