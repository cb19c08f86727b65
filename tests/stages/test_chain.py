"""The whole chain of commands on real images, for KL and VQ, in one process and in two.

The KL chain runs the commands that a user types, each in its own process below its launcher. The VQ chain runs the same
commands in processes forked from one that has torch loaded, which is faster and changes nothing else.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from stipple_core.files.manifest import problem
from tests.helpers.models.small_encoders import save_bert
from tests.helpers.training.many_processes import run_forked, succeed
from tests.helpers.training.tiny_runs import (
    CACHE,
    STAGE_1,
    STAGE_2,
    differing,
    final_state,
    launch,
    losses,
    metrics,
    run_here,
)

TWO_MICRO_BATCHES = "trainer.micro_batch_size=2"  # of the batch of 4


pytestmark = pytest.mark.usefixtures("settings_of_runs")


@dataclass(frozen=True)
class Chain:
    """The files and outputs of the four commands."""

    folder: Path
    kind: str  # of regularizer
    outputs: list[str]

    def stage_1(self, run: str, *more: str) -> list[str]:
        return [*STAGE_1, f"autoencoder.regularizer={self.kind}", f"run={self.folder / run}", *more]

    def stage_2(self, run: str, *more: str) -> list[str]:
        model = f"autoencoder={self.folder}/autoencoder/model"
        return [*STAGE_2, model, "data.flip=true", f"run={self.folder / run}", *more]


@pytest.fixture(scope="module", params=["kl", "vq"])
def chain(request, tmp_path_factory) -> Chain:
    folder = tmp_path_factory.mktemp(request.param)
    chain = Chain(folder, request.param, [])
    cache = f"cache={folder}/cache"
    model = f"autoencoder={folder}/autoencoder/model"
    commands = [
        chain.stage_1("autoencoder"),
        [*CACHE, model, cache, "data.flip=true"],
        chain.stage_2("cached", cache),
        ["txt2img.py", "a red heart", "--checkpoint", f"{folder}/cached/model", "--outdir", f"{folder}/pictures"],
    ]
    for command in commands:
        if request.param == "kl":
            chain.outputs.append(launch(*command, processes=1 if "train" in command[0] else 0))
        else:
            chain.outputs.append(succeed(*command))
    return chain


def test_four_commands_turn_a_folder_of_images_into_an_image_of_a_prompt(chain):
    with Image.open(chain.folder / "pictures" / "00000.png") as image:
        image.load()
        assert image.size == (32, 32) and image.mode == "RGB"
        assert len(image.getcolors(32 * 32)) > 16
        assert image.text["parameters"].startswith("a red heart\n")
    for run in ("autoencoder", "cached"):
        assert [step for step, _ in losses(chain.folder / run)] == list(range(1, 9))
        assert problem(chain.folder / run / "model") is None
        assert sorted(path.name for path in (chain.folder / run / "samples").iterdir())[-1] == "step-0000008.png"


def test_every_command_prints_the_next_one(chain):
    stage_1, cache, stage_2 = (shlex.split(output.splitlines()[-1]) for output in chain.outputs[:3])
    assert stage_1[:4] == ["stipple", "cache", "--config", "configs/ldm/tiny.yaml"]
    assert {f"autoencoder={chain.folder}/autoencoder/model", "data.folder=tests/pictures"} <= set(stage_1)
    assert cache[:4] == ["stipple", "train", "--config", "configs/ldm/tiny.yaml"]
    assert {f"autoencoder={chain.folder}/autoencoder/model", f"cache={chain.folder}/cache"} <= set(cache)
    assert stage_2[:2] == ["stipple", "draw"] and stage_2[3:] == ["--checkpoint", f"{chain.folder}/cached/model"]
    assert chain.outputs[3].strip() == f"{chain.folder}/pictures/00000.png"


def test_stage_1_reports_the_metrics_of_its_regularizer(chain):
    validations = [line for line in metrics(chain.folder / "autoencoder") if "validation_psnr" in line]
    assert [line["step"] for line in validations] == [4, 8]
    expected = {"kl": {"validation_kl"}, "vq": {"validation_usage", "validation_perplexity"}}[chain.kind]
    for line in validations:
        axes = {"validation_brightness", "validation_red_blue", "validation_green_magenta"}
        assert line.keys() == {"step", "validation_psnr", "validation_ssim"} | axes | expected
    revivals = [line["step"] for line in metrics(chain.folder / "autoencoder") if "codes_revived" in line]
    assert revivals == ([2, 4, 6, 8] if chain.kind == "vq" else [])


def test_the_discriminator_does_not_run_before_its_start_step(chain):
    seen = [line["step"] for line in metrics(chain.folder / "autoencoder") if "discriminator_loss" in line]
    assert seen == [4, 5, 6, 7, 8]


def test_training_from_the_cache_equals_training_from_images(chain):
    run_here(*chain.stage_2("direct"))
    cached, direct = (dict(losses(chain.folder / run)) for run in ("cached", "direct"))
    assert direct == pytest.approx(
        cached, rel=1e-6
    )  # rounding: images are encoded 16 at a time for the cache, 4 at a time here


def test_two_processes_train_stage_1_bit_for_bit_like_one_with_two_micro_batches(chain):
    succeed(*chain.stage_1("two-1"), processes=2)
    run_here(*chain.stage_1("one-1", TWO_MICRO_BATCHES))
    assert losses(chain.folder / "two-1") == losses(chain.folder / "one-1")
    assert final_state(chain.folder / "two-1") == final_state(chain.folder / "one-1")
    assert differing(chain.folder / "two-1" / "model", chain.folder / "one-1" / "model") == []


def test_two_processes_train_stage_2_bit_for_bit_like_one_with_two_micro_batches(chain):
    run = launch if chain.kind == "kl" else succeed  # once by the launcher itself
    run(*chain.stage_2("two-2"), processes=2)
    run_here(*chain.stage_2("one-2", TWO_MICRO_BATCHES))
    assert losses(chain.folder / "two-2") == losses(chain.folder / "one-2")
    assert final_state(chain.folder / "two-2") == final_state(chain.folder / "one-2")
    assert differing(chain.folder / "two-2" / "model", chain.folder / "one-2" / "model") == []


def test_two_processes_fill_the_same_cache(chain):
    if chain.kind == "kl":  # the cache does not depend on the regularizer
        command = [*CACHE, f"autoencoder={chain.folder}/autoencoder/model", "data.flip=true"]
        succeed(*command, f"cache={chain.folder}/cache-2", processes=2)
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
        (code,), _, errors = run_forked(*command, f"run={tmp_path / 'run'}")
        assert code == 2
        (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert "moments-00000000.npy is damaged at row" in error and "Traceback" not in errors


def test_training_with_a_frozen_text_encoder_is_alike_from_cached_contexts_and_captions(chain, tmp_path):
    """Cached contexts are float16 with 11 bits, so the losses agree to about 3 digits."""
    if chain.kind == "kl":
        save_bert(tmp_path)
        frozen = ["conditioner.kind=transformers", f"conditioner.name={tmp_path}"]
        cache = f"cache={chain.folder}/cache-frozen"
        command = chain.stage_2("frozen-cached", cache, *frozen)
        run_here(CACHE[0], *command[1:])
        run_here(*command)
        run_here(*chain.stage_2("frozen", *frozen))
        cached, direct = (dict(losses(chain.folder / run)) for run in ("frozen-cached", "frozen"))
        assert cached == pytest.approx(direct, rel=1e-3) and cached != direct
