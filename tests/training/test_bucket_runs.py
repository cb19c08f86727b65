"""Training in buckets: both stages train, resume, and give the same bits in one process and in two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conditioning import Unconditional
from conditioning.readers.combined import CombinedConditioner
from conditioning.readers.frame import FrameConfig, FrameReader
from stipple.stages.data.data_check import DataCheck
from stipple.stages.data.run_data import RunData
from stipple.stages.ldm.batch_encoder import BatchEncoder
from stipple.stages.ldm.denoiser_validation import SamplePrompts
from stipple_core.data.records.buckets import BucketConfig, assign, bucket_shapes
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.sources.scan import scan
from tests.helpers.training.tiny_runs import CACHE, STAGE_1, STAGE_2, final_state, launch, losses, run_here

pytestmark = pytest.mark.usefixtures("settings_of_runs")
OPTIONS = ["data.buckets={step: 8}", "trainer.steps=4", "trainer.save_every=2", "trainer.micro_batch_size=2"]


def make_folder(folder: Path) -> str:
    """Captioned noise images of many shapes."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as file:
        for number, (width, height) in enumerate(draw.integers(24, 80, (50, 2)).tolist()):
            pixels = draw.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
            file.write(json.dumps({"file_name": f"{number:02}.png", "text": f"noise {number}"}) + "\n")
    return f"data.folder={folder}"


def test_both_stages_train_in_buckets_and_resume_exactly(tmp_path):
    data = make_folder(tmp_path / "data")
    for name, stage in (
        ("ae", [*STAGE_1, "validation.every=4"]),
        ("ldm", [*STAGE_2, "validation.every=4", "samples.every=0", f"autoencoder={tmp_path}/ae/model"]),
    ):
        run, command = tmp_path / name, [*stage, data, *OPTIONS]
        run_here(*command, f"run={run}")
        whole = final_state(run), losses(run)
        assert len(whole[1]) == 4 and all(np.isfinite(loss) for _, loss in whole[1])
        shutil.rmtree(run / "state" / "step-0000004")
        run_here(*command, f"run={run}")
        assert (final_state(run), losses(run)) == whole


def test_training_from_cached_buckets_equals_training_from_images(tmp_path):
    data = make_folder(tmp_path / "data")
    (tmp_path / "data/07.png").write_bytes(b"no picture")
    run_here(*STAGE_1, data, f"run={tmp_path}/ae", "trainer.steps=1", "validation.every=0")
    overrides = [data, *OPTIONS, f"autoencoder={tmp_path}/ae/model", "data.flip=true", "samples.every=0"]
    cache = f"cache={tmp_path}/cache"
    run_here(*CACHE, *overrides, cache)
    run_here(*STAGE_2, *overrides, cache, f"run={tmp_path}/cached")
    run_here(*STAGE_2, *overrides, f"run={tmp_path}/direct")
    cached, direct = (dict(losses(tmp_path / run)) for run in ("cached", "direct"))
    assert len(cached) == 4 and cached == pytest.approx(direct, rel=1e-5)
    sizes = np.load(tmp_path / "cache/sizes.npy")
    assert len(np.unique(sizes, axis=0)) == 4 and (sizes == 0).any()


def test_settings_that_do_not_go_with_buckets_are_refused_in_one_line(tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    run_here(*STAGE_1, data, f"run={tmp_path}/ae", "trainer.steps=1", "validation.every=0")
    run = [f"run={tmp_path}/run", f"autoencoder={tmp_path}/ae/model"]
    for command, message in (
        ([*STAGE_1, "data.buckets={step: 2}"], "data.buckets.step 2 is not a multiple of 4 (autoencoder downsampling)"),
        ([*STAGE_2, "data.buckets={step: 4}"], "data.buckets.step 4 is not a multiple of 8 (downsampling of autoenc"),
        ([*STAGE_2, "data.buckets={}"], "data.image_size 32 is not a multiple of data.buckets.step 64; use image_size"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_here(*command, data, *run[: 2 if command[0] == STAGE_2[0] else 1])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and line.startswith(f"error: {message}"), line
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_in_buckets_like_one(tmp_path):
    data, states = make_folder(tmp_path / "data"), []
    for processes in (0, 2):
        ae, ldm = tmp_path / f"ae{processes}", tmp_path / f"ldm{processes}"
        launch(*STAGE_1, data, *OPTIONS, f"run={ae}", processes=processes)
        launch(*STAGE_2, data, *OPTIONS, f"run={ldm}", f"autoencoder={ae}/model", processes=processes)
        states.append((final_state(ae), final_state(ldm)))
    assert states[0] == states[1]


def test_examples_have_one_shape_with_any_buckets(tmp_path):
    make_folder(tmp_path / "data")
    config = DataConfig(folder=str(tmp_path / "data"), image_size=32, validation=0.3, buckets=BucketConfig(step=8))
    records, shapes = scan(config), bucket_shapes(32, config.buckets)
    sizes = [Image.open(record.path).size for record in records.validation]
    data_check = DataCheck(records=records, held_out=assign(sizes, shapes))
    pictures = RunData.open(config, data_check, 0, str(tmp_path / "run"))
    assert len({pictures.held_out.held_out(i).image.shape for i in range(8)}) > 1
    conditioner = CombinedConditioner(Unconditional(), {"frame": FrameReader(FrameConfig(width=2))})
    samples = SamplePrompts.of([], pictures.examples, BatchEncoder(None, conditioner, conditioner, None))
    assert samples.inputs.frame.shape == (8, 6) and pictures.examples.records is records.validation
