"""Settings of both stages: invalid ones are refused, and changed ones are reported when a run is resumed."""

from __future__ import annotations

import pytest
import yaml

from stipple.stages.autoencoder.autoencoder_run import AutoencoderRunConfig
from stipple.stages.data.run_settings import changes
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.config import load_config, save_config

BOTH = (AutoencoderRunConfig, LdmRunConfig)
REQUIRED = ["data.folder=FOLDER"]


def read(stage: type, *overrides: str):
    needed = ["autoencoder=FOLDER"] * (stage is LdmRunConfig)
    return load_config(stage, None, [*REQUIRED, *needed, *overrides])


@pytest.mark.parametrize("stage", BOTH, ids=["stage 1", "stage 2"])
@pytest.mark.parametrize(
    ("override", "message"),
    {
        "optimizer.warmup_steps=-5": "optimizer.warmup_steps -5 must be at least 0",
        "validation.images=0": "validation.images 0 must be at least 1",
        "validation.every=-1": "validation.every -1 must be at least 0",
        "data.min_size=-4": "data.min_size is -4; it must be at least 0",
        "data.max_bad_fraction=-1": "data.max_bad_fraction is -1.0; it is a fraction",
        "data.max_bad_fraction=1.5": "data.max_bad_fraction is 1.5; it is a fraction",
        "data.background=nocolor": "data.background is 'nocolor'; it must be a color's name",
        "trainer.timeout_minutes=1e12": "trainer.timeout_minutes 1e.12 must be above 0 and at most",
        "trainer.workers=-1": "trainer.workers -1 must be at least 0",
        "seed=99999999999999999999999": r"seed 99999999999999999999999 must be from",
        "run=''": "run is ''; set it to the name",
        "run=' '": "run is ' '; set it to the name",
    }.items(),
)
def test_invalid_settings_are_refused_with_key_value_and_rule(stage, override, message):
    with pytest.raises(ValueError, match=message) as refused:
        read(stage, override)
    assert "\n" not in str(refused.value)


def test_a_negative_number_of_steps_between_samples_is_refused():
    with pytest.raises(ValueError, match="samples.every -1 must be at least 0"):
        read(LdmRunConfig, "samples.every=-1")


@pytest.mark.parametrize("stage", BOTH, ids=["stage 1", "stage 2"])
def test_a_run_without_validation_needs_no_validation_images(stage):
    assert read(stage, "validation.every=0", "validation.images=0").validation.images == 0


@pytest.mark.parametrize("stage", BOTH, ids=["stage 1", "stage 2"])
def test_changes_lists_the_settings_that_affect_results(stage, tmp_path):
    path = str(tmp_path / "config.yaml")
    save_config(read(stage), path)
    free = ["trainer.steps=7", "trainer.workers=2", "run=other", "validation.every=5", "trainer.resume=false"]
    moved = ["data.maps=elsewhere", "data.folder=moved"]
    assert changes(read(stage, *free, *moved), path) == ""
    now = ["seed=3", "trainer.batch_size=8", "data.flip=true", "trainer.precision=bf16", "optimizer.learning_rate=0.5"]
    changed = changes(read(stage, *now), path)
    for each in (
        "seed 0 -> 3",
        "batch_size 32 -> 8",
        "flip False -> True",
        "precision no -> bf16",
        "_rate 0.0001 -> 0.5",
    ):
        assert each in changed
    assert changes(read(stage, *now, "ema.decay=0.5", "data.crop=random"), path).endswith(" and 2 more")


def test_settings_that_cannot_be_read_are_not_compared(tmp_path):
    config = read(LdmRunConfig)
    assert changes(config, str(tmp_path / "none.yaml")) == ""
    (tmp_path / "config.yaml").write_text("[")
    assert changes(config, str(tmp_path / "config.yaml")) == ""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed": 5}))
    assert changes(config, str(tmp_path / "config.yaml")) == "seed 5 -> 0"


def test_files_that_a_run_reads_besides_its_data_may_be_moved(tmp_path):
    def run(folder: str) -> LdmRunConfig:
        preservation = f"preservation={{folder: {folder}, prompt: a dog}}"
        return read(LdmRunConfig, preservation, f"conditioner.retrieval={{database: {folder}}}", "init_from=MODEL")

    save_config(run("here"), str(tmp_path / "config.yaml"))
    assert changes(run("there"), str(tmp_path / "config.yaml")) == ""
