"""Training commands refuse invalid configs at once, in one line, and survive damaged or missing images."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.helpers.training.tiny_runs import STAGE_1, STAGE_2, run_here

PICTURES = Path(__file__).parents[2] / "tests" / "pictures" / "photos"


pytestmark = pytest.mark.usefixtures("settings_of_runs")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scripts") / "auto encoder"
    run_here(*STAGE_1, f"run={folder}", "trainer.steps=1")
    return f"{folder}/model"


def refused(capsys, *command: str) -> str:
    """The error line of a command, which has to end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        run_here(*command)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and lines[-1].startswith("error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.steps=0", "trainer.steps 0"),
        ("trainer.log_every=0", "trainer.log_every 0"),
        ("trainer.micro_batch_size=-1", "trainer.micro_batch_size -1"),
        ("trainer.micro_batch_size=3", "multiple"),
        ("trainer.precision=fp8", "fp8"),
        ("optimizer.schedule=cosin", "cosin"),
        ("optimizer.betas=[0.9]", "betas"),
        ("ema.decay=3", "ema.decay 3"),
        ("autoencoder.norm_num_groups=0", "norm_num_groups 0"),
        ("data.validation=0.999999", "held out"),
        ("data.folder=nowhere", "nowhere"),
        ("optimizer.learning_rat=1", "learning_rate"),
        ("data.image_size=30", "30"),
    ],
)
def test_stage_1_refuses_an_invalid_config_before_it_writes_anything(tmp_path, capsys, override, words):
    assert words in refused(capsys, *STAGE_1, f"run={tmp_path / 'run'}", override)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("samples.steps=2000", "2000 steps"),
        ("samples.sampler=ddmi", "ddim"),
        ("diffusion.weighting=foo", "min_snr"),
        ("diffusion.density.name=foo", "logit_normal"),
        ("diffusion.caption_dropout=2", "caption_dropout 2"),
        ("diffusion.prediction=epsilon", "velocity"),
        ("validation.levels=0", "validation.levels 0"),
        ("save_precision=fp64", "fp16"),
        ("unet.in_channels=5", "use 4"),
        ("cache=nowhere", "stipple cache"),
        ("autoencoder=nowhere", "nowhere"),
    ],
)
def test_stage_2_refuses_an_invalid_config_before_it_writes_anything(tmp_path, capsys, autoencoder, override, words):
    assert words in refused(capsys, *STAGE_2, f"autoencoder={autoencoder}", f"run={tmp_path / 'run'}", override)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_does_not_change_the_config_in_the_run_folder(tmp_path, capsys):
    run_here(*STAGE_1, f"run={tmp_path}", "trainer.steps=1")
    before = (tmp_path / "config.yaml").read_bytes()
    refused(capsys, *STAGE_1, f"run={tmp_path}", "autoencoder.block_out_channels=[8,16,16]")
    assert (tmp_path / "config.yaml").read_bytes() == before


def small_folder(folder: Path) -> Path:
    """Three captioned photographs and a damaged one, in a folder whose name needs quoting."""
    shutil.copytree(PICTURES, folder)
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (folder / "damaged.txt").write_text('a "damaged" one')
    return folder


@pytest.mark.parametrize("validation", [0, 0.4])
def test_both_stages_train_with_damaged_images_and_without_held_out_ones(tmp_path, capsys, autoencoder, validation):
    data = [f"data.folder={small_folder(tmp_path / 'my pics')}", f"data.validation={validation}"]
    steps = ["trainer.steps=4", "validation.every=2"]
    run_here(*STAGE_1, *data, *steps, f"run={tmp_path / 'a'}")
    run_here(*STAGE_2, *data, *steps, "samples.every=2", f"autoencoder={autoencoder}", f"run={tmp_path / 'b'}")
    for run in "ab":
        skipped = [json.loads(line) for line in (tmp_path / run / "skipped.jsonl").read_text().splitlines()]
        assert [skip["path"] for skip in skipped] == ["damaged.jpg"]
    assert (tmp_path / "b" / "samples" / "step-0000004.png").is_file()


def test_the_next_command_is_quoted_so_that_it_runs_with_any_names(tmp_path, capsys, autoencoder):
    folder = small_folder(tmp_path / "my pics")
    run_here(*STAGE_1, f"data.folder={folder}", f"run={tmp_path / 'a b'}", "trainer.steps=1")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["stipple", "cache"] and f"data.folder={folder}" in command
    config = Path(command[command.index("--config") + 1])
    assert (Path(__file__).parents[2] / config).is_file()
    run_here("stipple.commands.cache", *command[2:], f"cache={tmp_path / 'c d'}")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["stipple", "train"]
    run = f"run={tmp_path / 'e f'}"
    run_here("train_ldm.py", *command[2:], run, "trainer.steps=1", "samples.every=0", "validation.every=0")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["stipple", "draw"] and command[-1] == f"{tmp_path / 'e f'}/model"


def test_a_run_that_is_resumed_with_other_data_warns(tmp_path, capsys):
    folder = small_folder(tmp_path / "pictures")
    command = [*STAGE_1, f"data.folder={folder}", f"run={tmp_path / 'run'}", "data.validation=0"]
    run_here(*command, "trainer.steps=1")
    run_here(*command, "trainer.steps=2")
    assert "images and captions changed" not in capsys.readouterr().out
    (folder / "damaged.jpg").unlink()  # which the run could not use
    run_here(*command, "trainer.steps=3")
    assert "images and captions changed" not in capsys.readouterr().out
    sorted(folder.glob("*.txt"))[0].with_suffix(".webp").unlink()
    run_here(*command, "trainer.steps=4")
    assert "images and captions changed" in capsys.readouterr().out
