"""Claims about init_from: both trainers go on from folders and single files, with nothing else said about the model."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from single_files import build_parts, write_yaml
from tiny_runs import losses, run_here

from autoencoder import Autoencoder
from ldm.parts import open_model, save_model
from ldm.single_file import save_first_stage, save_single_file
from storage.checkpoint import problem
from storage.weights import read_weights

PICTURES = "data.folder=tests/pictures"
SHORT = [
    "data.validation=0.2",
    "trainer.steps=2",
    "trainer.batch_size=2",
    "trainer.save_every=2",
    "trainer.log_every=1",
]
FEW = [*SHORT, "samples.every=0", "samples.steps=2", "samples.prompts=[a red heart]", "validation.every=0"]
STAGE_1 = [*SHORT, "perceptual.kind=ssim", "discriminator_start=null", "validation.scale_images=8"]


pytestmark = pytest.mark.usefixtures("settings_of_runs")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Folders of small models that others might have trained."""
    folder = tmp_path_factory.mktemp("given")
    for kind in ("sd1", "sd2", "inpainting", "unconditional"):
        save_model(build_parts(kind, folder / "words"), folder / kind)
    without = build_parts("class", folder / "words")
    without.conditioner.null_class = None
    save_model(without, folder / "no null")
    save_single_file(build_parts("class", folder / "words"), folder / "class.safetensors")
    save_first_stage(build_parts("sd1", folder / "words").autoencoder, folder / "vae.safetensors")
    return folder


def change(a, b) -> float:
    """The largest difference of two modules' weights."""
    theirs = b.state_dict()
    return max((value - theirs[name]).abs().max().item() for name, value in a.state_dict().items())


def test_of_an_autoencoder_the_decoder_alone_can_learn_and_latents_stay_bit_for_bit(given, tmp_path):
    given_to = [f"init_from={given}/sd1", PICTURES, f"run={tmp_path}/run", *STAGE_1]
    run_here("train_autoencoder.py", *given_to, "decoder_only=true")
    before, after = Autoencoder.load(given / "sd1"), Autoencoder.load(tmp_path / "run" / "model")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(after.encode(images).moments, before.encode(images).moments)
        assert not torch.equal(after.decode(torch.ones(1, 4, 4, 4)), before.decode(torch.ones(1, 4, 4, 4)))
    with pytest.raises(SystemExit):
        run_here("train_autoencoder.py", PICTURES, f"run={tmp_path}/other", "decoder_only=true")


def test_train_ldm_goes_on_from_a_model_with_nothing_but_a_folder_of_pictures(given, tmp_path, capsys):
    run_here("train_ldm.py", f"init_from={given}/sd2", PICTURES, f"run={tmp_path}/run", *FEW, "samples.every=2")
    assert f"--checkpoint {tmp_path}/run/model" in capsys.readouterr().out
    before, after = open_model(given / "sd2"), open_model(tmp_path / "run" / "model")
    assert problem(tmp_path / "run" / "model") is None and len(losses(tmp_path / "run")) == 2
    assert after.unet.config == before.unet.config and after.autoencoder.config == before.autoencoder.config
    assert after.scheduling == before.scheduling and after.scheduling.prediction == "velocity"
    assert after.settings == replace(before.settings, steps=2) and after.settings.guidance_scale == 7.5
    assert 0 < change(after.unet, before.unet) < 1e-3  # two steps from there, not from anywhere
    assert change(after.autoencoder, before.autoencoder) == change(after.conditioner, before.conditioner) == 0


def test_the_config_that_is_left_behind_resumes_the_run(given, tmp_path):
    run = tmp_path / "run"
    run_here("train_ldm.py", f"init_from={given}/sd1", PICTURES, f"run={run}", *FEW, "trainer.steps=1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["autoencoder"] == config["init_from"] == f"{given}/sd1"
    assert config["unet"]["block_out_channels"] == [64, 128] and config["data"]["image_size"] == 16
    run_here("train_ldm.py", "--config", f"{run}/config.yaml", "trainer.steps=2", f"run={run}")
    assert [step for step, _ in losses(run)] == [1, 2]
    whole = tmp_path / "whole"
    run_here("train_ldm.py", f"init_from={given}/sd1", PICTURES, f"run={whole}", *FEW)
    assert change(open_model(run / "model").unet, open_model(whole / "model").unet) == 0


def test_yaml_and_overrides_lie_over_what_the_model_says(given, tmp_path):
    from stages.ldm_run import RunConfig, inherited
    from storage.config import load_config

    path = tmp_path / "c.yaml"
    path.write_text("diffusion: {prediction: noise, caption_dropout: 0.2}\nunet: {dropout: 0.1}\n")
    overrides = [f"init_from={given}/sd2", PICTURES, "data.image_size=32", "unet.sample_size=16"]
    config = load_config(RunConfig, str(path), overrides, inherited)
    assert (config.diffusion.prediction, config.diffusion.caption_dropout) == ("noise", 0.2)
    assert config.diffusion.schedule.beta_end == 0.012 and config.unet.use_linear_projection
    assert (config.unet.dropout, config.unet.sample_size, config.data.image_size) == (0.1, 16, 32)


def test_a_text_encoder_from_scratch_goes_on_learning_and_a_frozen_one_stays(tmp_path):
    first, model = tmp_path / "first", tmp_path / "vae"
    build_parts("sd1", tmp_path / "words").autoencoder.save(model)
    text = ["conditioner.kind=scratch", "conditioner.scratch={vocab_size: 600, width: 32, layers: 1, heads: 2}"]
    unet = "{sample_size: 8, block_out_channels: [32, 32], layers_per_block: 1, attention_levels: [true, true]"
    unet += ", attention_heads: [2], cross_attention_dim: 32, norm_num_groups: 8}"
    options = [f"autoencoder={model}", "data.image_size=16", f"unet={unet}", *text]
    run_here("train_ldm.py", PICTURES, f"run={first}", *FEW, *options)
    assert json.loads((first / "model" / "model_index.json").read_text())["_stipple"]["text_encoder_trained"]
    run_here("train_ldm.py", f"init_from={first}/model", PICTURES, f"run={tmp_path}/second", *FEW)
    before, after = open_model(first / "model"), open_model(tmp_path / "second" / "model")
    assert after.conditioner.trainable and 0 < change(after.conditioner, before.conditioner) < 1e-2
    assert open_model(tmp_path / "second" / "model").conditioner.tokenizer.fingerprint() == (
        before.conditioner.tokenizer.fingerprint()
    )


def refused(capsys, script, *arguments):
    with pytest.raises(SystemExit) as caught:
        run_here(script, *map(str, arguments))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    return said


def test_what_does_not_fit_the_model_is_one_line(given, tmp_path, capsys):
    runs = itertools.count()

    def said(*arguments):
        run = f"run={tmp_path}/run{next(runs)}"
        return refused(capsys, "train_ldm.py", PICTURES, run, *FEW, *arguments)

    sd1 = f"init_from={given}/sd1"
    wide = said(sd1, "unet.block_out_channels=[64, 64]", "unet.attention_heads=[2]")
    assert "unet.block_out_channels is (64, 64), not (64, 128); unet.attention_heads is (2, 2), not (4, 4)" in wide
    assert "unet.norm_eps" in said(sd1, "unet.norm_eps=1e-6")
    assert "this model is unconditional; leave it empty" in said(f"init_from={given}/unconditional")
    assert "has no null class" in said(f"init_from={given}/no null")
    assert "give its YAML, which says num_heads (convert_checkpoint.py" in said(f"init_from={given}/class.safetensors")
    assert "nowhere does not exist" in said(f"init_from={tmp_path}/nowhere")
    assert "init_from" in said("init_from=5", "autoencoder=x")
    assert not list(tmp_path.glob("run*/model"))


@pytest.mark.parametrize("source", ["sd1", "sd1/vae", "vae.safetensors"])
def test_train_autoencoder_goes_on_from_model_folders_vae_folders_and_single_files(source, given, tmp_path):
    run_here("train_autoencoder.py", f"init_from={given}/{source}", PICTURES, f"run={tmp_path}/run", *STAGE_1,
             "data.image_size=16")  # fmt: skip
    before, after = Autoencoder.load(given / "sd1"), Autoencoder.load(tmp_path / "run" / "model")
    assert {**vars(after.config), "sample_size": 0} == {**vars(before.config), "sample_size": 0}
    decoder = before.decoder, after.decoder  # the scale's mean goes into the convolutions around the latents
    assert 0 < change(*decoder) < 1e-3
    assert after.scaling_factor != before.scaling_factor


def test_an_autoencoder_of_another_shape_is_one_line(given, tmp_path, capsys):
    wide = refused(capsys, "train_autoencoder.py", f"init_from={given}/sd1", PICTURES, f"run={tmp_path}/run", *STAGE_1,
                   "autoencoder.layers_per_block=2")  # fmt: skip
    assert "autoencoder.layers_per_block is 2, not 1; leave out what differs" in wide


def test_overwriting_the_checkpoint_that_a_run_came_from_does_not_change_its_weights(tmp_path):
    from stages.ldm_parts import make_unet
    from stages.ldm_run import DataConfig, RunConfig

    parts, path, yaml = build_parts("sd1", tmp_path), tmp_path / "model.ckpt", write_yaml(tmp_path)
    save_single_file(parts, tmp_path / "model.safetensors")
    torch.save({"state_dict": read_weights(tmp_path / "model.safetensors")}, path)  # which is mapped into memory
    init = open_model(path, config_yaml=yaml)
    config = RunConfig(init_from=str(path), data=DataConfig(folder=""), autoencoder="", unet=init.unet.config)
    unet = make_unet(config, init)
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)  # in place
    assert change(unet, parts.unet) == 0 and all(parameter.requires_grad for parameter in unet.parameters())


def test_what_an_inpainting_model_is_shown_begins_with_no_effect_whatever_its_start_was_shown(tmp_path):
    from conditioning.building import ConditionerConfig
    from conditioning.spatial import SpatialConfig
    from stages.ldm_parts import make_unet
    from stages.ldm_run import DataConfig, RunConfig

    init = build_parts("depth", tmp_path)
    torch.nn.init.normal_(init.unet.conv_in.weight)

    def begun(kind: str, channels: int) -> torch.Tensor:
        shape = replace(init.unet.config, in_channels=channels)
        shown = ConditionerConfig(spatial=SpatialConfig(kind=kind))
        config = RunConfig(init_from="x", data=DataConfig(folder=""), autoencoder="", unet=shape, conditioner=shown)
        return make_unet(config, init).conv_in.weight

    before = init.unet.conv_in.weight
    completing, same = begun("inpainting", 9), begun("depth", 5)
    assert torch.equal(completing[:, :4], before[:, :4]) and not completing[:, 4:].any()
    assert torch.equal(same, before)
