"""Runs with importance sampling of times: stopped and resumed, in one process and in two."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig
from stipple_core.files.training_state import load_state
from tests.helpers.training.many_processes import succeed
from tests.helpers.training.tiny_runs import STAGE_2, differing, metrics, run_here

pytestmark = pytest.mark.usefixtures("settings_of_runs")
COMMAND = [
    *STAGE_2, "trainer.batch_size=10", "trainer.micro_batch_size=5", "trainer.save_every=4", "diffusion.weighting=p2",
    "diffusion.density.name=importance", "diffusion.schedule.timesteps=4", "samples.every=0", "validation.every=0",
]  # fmt: skip  # of 80 losses, each of four levels has ten before the end
PARTS = ("state/step-0000004", "state/step-0000008", "model")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[str], Path]:
    """A command without its `run=`, and the folder of its uninterrupted run."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("importance")
    config = AutoencoderConfig(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=32)
    Autoencoder(config).save(folder / "autoencoder")
    command = [*COMMAND, f"autoencoder={folder / 'autoencoder'}"]
    run_here(*command, f"run={folder / 'run'}")
    return command, folder / "run"


def learnt(run: Path) -> dict[str, torch.Tensor]:
    return load_state(sorted((run / "state").iterdir())[-1])["parts"]["importance"]


def test_every_loss_is_counted_and_all_levels_have_enough_of_them(whole):
    counts = learnt(whole[1])["counts"]
    assert counts.sum() == 80 and counts.min() >= 10


def test_importance_weights_change_the_run_once_levels_are_drawn_unevenly(whole, tmp_path):
    """Until then, the run equals one with uniform times."""
    command, run = whole
    run_here(*command, "diffusion.density.name=uniform", f"run={tmp_path / 'run'}")
    one, other = ([line["loss"] for line in metrics(folder)] for folder in (run, tmp_path / "run"))
    assert one[:4] == other[:4] and one[-1] != other[-1]


def test_a_run_stopped_after_each_of_three_steps_equals_an_uninterrupted_one(whole, tmp_path):
    command, run = whole
    for _ in range(3):
        with pytest.raises(SystemExit, match="0"):
            run_here(*command, f"run={tmp_path / 'run'}", "trainer.max_minutes=0")
        gc.collect()
    run_here(*command, f"run={tmp_path / 'run'}")
    assert metrics(tmp_path / "run") == metrics(run)
    assert [differing(tmp_path / "run" / part, run / part) for part in PARTS] == [[], [], []]


def test_two_processes_train_the_same_as_one_with_two_micro_batches(whole, tmp_path):
    command, run = whole
    succeed(*command, f"run={tmp_path / 'run'}", processes=2)
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in metrics(run)]
    assert differing(tmp_path / "run" / "state" / "step-0000008", run / "state" / "step-0000008") == []
