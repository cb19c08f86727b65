"""The whole chain on real pictures, by the commands that a user types, for KL and VQ; on one process and on two."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from stipple_core.files.manifest import problem
from tests.helpers.small_encoders import save_bert
from tests.helpers.tiny_runs import (
    CACHE,
    STAGE_1,
    STAGE_2,
    differing,
    final_state,
    launch,
    losses,
    metrics,
    run_here,
    start,
)

TWO_MICRO_BATCHES = "trainer.micro_batch_size=2"  # of the batch of 4


pytestmark = pytest.mark.usefixtures("settings_of_runs")


@dataclass(frozen=True)
class Chain:
    """What the four commands left behind and said."""

    folder: Path
    kind: str
    said: list[str]

    def stage_1(self, run: str, *more: str) -> list[str]:
        return [*STAGE_1, f"autoencoder.regularizer={self.kind}", f"run={self.folder / run}", *more]

    def stage_2(self, run: str, *more: str) -> list[str]:
        model = f"autoencoder={self.folder}/autoencoder/model"
        return [*STAGE_2, model, "data.flip=true", f"run={self.folder / run}", *more]


@pytest.fixture(scope="module", params=["kl", "vq"])
def chain(request, tmp_path_factory) -> Chain:
    folder = tmp_path_factory.mktemp(request.param)
    made = Chain(folder, request.param, [])
    cache = f"cache={folder}/cache"
    model = f"autoencoder={folder}/autoencoder/model"
    said = [
        launch(*made.stage_1("autoencoder"), processes=1),
        launch(*CACHE, model, cache, "data.flip=true"),
        launch(*made.stage_2("cached", cache), processes=1),
        launch("txt2img.py", "a red heart", "--checkpoint", f"{folder}/cached/model", "--outdir", f"{folder}/pictures"),
    ]
    return Chain(folder, request.param, said)


def test_three_commands_lead_from_a_folder_of_pictures_to_one_that_shows_a_prompt(chain):
    with Image.open(chain.folder / "pictures" / "00000.png") as picture:
        picture.load()
        assert picture.size == (32, 32) and picture.mode == "RGB"
        assert len(picture.getcolors(32 * 32)) > 16
        assert picture.text["parameters"].startswith("a red heart\n")
    for run in ("autoencoder", "cached"):
        assert [step for step, _ in losses(chain.folder / run)] == list(range(1, 9))
        assert problem(chain.folder / run / "model") is None
        assert sorted(path.name for path in (chain.folder / run / "samples").iterdir())[-1] == "step-0000008.png"


def test_every_command_ends_with_the_next_one_to_type(chain):
    stage_1, cache, stage_2 = (shlex.split(said.splitlines()[-1]) for said in chain.said[:3])
    assert stage_1[:6] == ["accelerate", "launch", "-m", "stipple.commands.cache", "--config", "configs/ldm/tiny.yaml"]
    assert {f"autoencoder={chain.folder}/autoencoder/model", "data.folder=tests/pictures"} <= set(stage_1)
    assert cache[:5] == ["accelerate", "launch", "train_ldm.py", "--config", "configs/ldm/tiny.yaml"]
    assert {f"autoencoder={chain.folder}/autoencoder/model", f"cache={chain.folder}/cache"} <= set(cache)
    assert stage_2[:2] == ["python", "txt2img.py"] and stage_2[3:] == ["--checkpoint", f"{chain.folder}/cached/model"]
    assert chain.said[3].strip() == f"{chain.folder}/pictures/00000.png"


def test_stage_1_reports_what_its_regularizer_is_judged_by(chain):
    validations = [line for line in metrics(chain.folder / "autoencoder") if "validation_psnr" in line]
    assert [line["step"] for line in validations] == [4, 8]
    expected = {"kl": {"validation_kl"}, "vq": {"validation_usage", "validation_perplexity"}}[chain.kind]
    for line in validations:
        assert line.keys() == {"step", "validation_psnr", "validation_ssim"} | expected
    revivals = [line["step"] for line in metrics(chain.folder / "autoencoder") if "codes_revived" in line]
    assert revivals == ([2, 4, 6, 8] if chain.kind == "vq" else [])


def test_the_discriminator_does_not_run_before_its_start_step(chain):
    seen = [line["step"] for line in metrics(chain.folder / "autoencoder") if "discriminator_loss" in line]
    assert seen == [4, 5, 6, 7, 8]


def test_training_from_the_cache_is_training_straight_from_images(chain):
    run_here(*chain.stage_2("straight"))
    cached, straight = (dict(losses(chain.folder / run)) for run in ("cached", "straight"))
    assert straight == pytest.approx(
        cached, rel=1e-6
    )  # rounding: images are encoded 16 at a time for the cache, 4 at a time here


def test_two_processes_train_stage_1_as_one_with_two_micro_batches_does_bit_for_bit(chain):
    launch(*chain.stage_1("two-1"), processes=2)
    run_here(*chain.stage_1("one-1", TWO_MICRO_BATCHES))
    assert losses(chain.folder / "two-1") == losses(chain.folder / "one-1")
    assert final_state(chain.folder / "two-1") == final_state(chain.folder / "one-1")
    assert differing(chain.folder / "two-1" / "model", chain.folder / "one-1" / "model") == []


def test_two_processes_train_stage_2_as_one_with_two_micro_batches_does_bit_for_bit(chain):
    launch(*chain.stage_2("two-2"), processes=2)
    run_here(*chain.stage_2("one-2", TWO_MICRO_BATCHES))
    assert losses(chain.folder / "two-2") == losses(chain.folder / "one-2")
    assert final_state(chain.folder / "two-2") == final_state(chain.folder / "one-2")
    assert differing(chain.folder / "two-2" / "model", chain.folder / "one-2" / "model") == []


def test_two_processes_fill_the_same_cache(chain):
    if chain.kind == "kl":  # the cache knows no regularizer
        command = [*CACHE, f"autoencoder={chain.folder}/autoencoder/model", "data.flip=true"]
        launch(*command, f"cache={chain.folder}/cache-2", processes=2)
        assert differing(chain.folder / "cache", chain.folder / "cache-2") == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_in_the_cache_ends_training_in_one_line(workers, chain, tmp_path):
    if chain.kind == "kl":
        shutil.copytree(chain.folder / "cache", tmp_path / "cache")
        part = tmp_path / "cache" / "moments-00000000.npy"
        damaged = bytearray(part.read_bytes())
        for place in range(1000, len(damaged), 1000):
            damaged[place] ^= 4
        part.write_bytes(damaged)
        command = chain.stage_2("damaged", f"cache={tmp_path / 'cache'}", f"trainer.workers={workers}")
        process = start(
            *command, f"run={tmp_path / 'run'}", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "moments-00000000.npy is damaged at row" in error and "Traceback" not in said


def test_a_frozen_text_encoder_trains_from_cached_contexts_as_from_captions(chain, tmp_path):
    """Contexts are kept in float16: 11 bits, so the losses agree to about 3 digits."""
    if chain.kind == "kl":
        save_bert(tmp_path)
        frozen = ["conditioner.kind=transformers", f"conditioner.name={tmp_path}"]
        cache = f"cache={chain.folder}/cache-frozen"
        command = chain.stage_2("frozen-cached", cache, *frozen)
        run_here(CACHE[0], *command[1:])
        run_here(*command)
        run_here(*chain.stage_2("frozen", *frozen))
        cached, straight = (dict(losses(chain.folder / run)) for run in ("frozen-cached", "frozen"))
        assert cached == pytest.approx(straight, rel=1e-3) and cached != straight
