"""init_from: both stages start from folders and single files, which set the defaults of the config."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from autoencoder import Autoencoder
from ldm.formats.model_folder import save_model
from ldm.formats.opening import open_model
from ldm.formats.single_file_writer import save_first_stage, save_single_file
from ldm.sampling.defaults import default_settings
from stipple_core.files.manifest import problem
from stipple_core.files.weights import read_weights
from tests.helpers.models.single_files import build_parts, write_yaml
from tests.helpers.training.tiny_runs import losses, run_here

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
def models(tmp_path_factory) -> Path:
    """Folders and single files of small models."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("sd1", "sd2", "inpainting", "unconditional"):
        save_model(build_parts(kind, folder / "words"), folder / kind)
    without = build_parts("class", folder / "words")
    without.conditioner.null_class = None
    save_model(without, folder / "no null")
    save_single_file(build_parts("class", folder / "words"), folder / "class.safetensors")
    save_first_stage(build_parts("sd1", folder / "words").autoencoder, folder / "vae.safetensors")
    return folder


def change(a, b) -> float:
    """The largest difference between the weights of two modules."""
    weights = b.state_dict()
    return max((value - weights[name]).abs().max().item() for name, value in a.state_dict().items())


def test_with_decoder_only_the_latents_stay_equal_bit_for_bit_while_the_decoder_learns(models, tmp_path):
    arguments = [f"init_from={models}/sd1", PICTURES, f"run={tmp_path}/run", *STAGE_1]
    run_here("train_autoencoder.py", *arguments, "decoder_only=true")
    before, after = Autoencoder.load(models / "sd1"), Autoencoder.load(tmp_path / "run" / "model")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(after.encode(images).moments, before.encode(images).moments)
        assert not torch.equal(after.decode(torch.ones(1, 4, 4, 4)), before.decode(torch.ones(1, 4, 4, 4)))
    with pytest.raises(SystemExit):
        run_here("train_autoencoder.py", PICTURES, f"run={tmp_path}/other", "decoder_only=true")


def test_stage_2_starts_from_a_model_with_nothing_but_a_folder_of_images(models, tmp_path, capsys):
    run_here("train_ldm.py", f"init_from={models}/sd2", PICTURES, f"run={tmp_path}/run", *FEW, "samples.every=2")
    assert f"--checkpoint {tmp_path}/run/model" in capsys.readouterr().out
    before, after = open_model(models / "sd2"), open_model(tmp_path / "run" / "model")
    assert problem(tmp_path / "run" / "model") is None and len(losses(tmp_path / "run")) == 2
    assert after.unet.config == before.unet.config and after.autoencoder.config == before.autoencoder.config
    assert after.scheduling == before.scheduling and after.scheduling.prediction == "velocity"
    assert default_settings(after) == replace(default_settings(before), steps=2)
    assert default_settings(after).guidance_scale == 7.5
    assert 0 < change(after.unet, before.unet) < 1e-3  # two steps away from the model
    assert change(after.autoencoder, before.autoencoder) == change(after.conditioner, before.conditioner) == 0


def test_the_config_in_the_run_folder_resumes_the_run(models, tmp_path):
    run = tmp_path / "run"
    run_here("train_ldm.py", f"init_from={models}/sd1", PICTURES, f"run={run}", *FEW, "trainer.steps=1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["autoencoder"] == config["init_from"] == f"{models}/sd1"
    assert config["unet"]["block_out_channels"] == [64, 128] and config["data"]["image_size"] == 16
    run_here("train_ldm.py", "--config", f"{run}/config.yaml", "trainer.steps=2", f"run={run}")
    assert [step for step, _ in losses(run)] == [1, 2]
    whole = tmp_path / "whole"
    run_here("train_ldm.py", f"init_from={models}/sd1", PICTURES, f"run={whole}", *FEW)
    assert change(open_model(run / "model").unet, open_model(whole / "model").unet) == 0


def test_yaml_and_overrides_take_precedence_over_the_model(models, tmp_path):
    from stipple.stages.ldm.ldm_run import LdmRunConfig, config_from_init
    from stipple_core.config import load_config

    path = tmp_path / "c.yaml"
    path.write_text("diffusion: {prediction: noise, caption_dropout: 0.2}\nunet: {dropout: 0.1}\n")
    overrides = [f"init_from={models}/sd2", PICTURES, "data.image_size=32", "unet.sample_size=16"]
    config = load_config(LdmRunConfig, str(path), overrides, config_from_init)
    assert (config.diffusion.prediction, config.diffusion.caption_dropout) == ("noise", 0.2)
    assert config.diffusion.schedule.beta_end == 0.012 and config.unet.use_linear_projection
    assert (config.unet.dropout, config.unet.sample_size, config.data.image_size) == (0.1, 16, 32)


def test_a_text_encoder_that_was_trained_with_its_unet_is_trained_again(tmp_path):
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
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    return error


ADAPTED = ["lora.rank=2", "data.captions=[a heart]"]
OPENED_ONCE = {
    "a whole model": [],
    "LoRA and class images": [*ADAPTED, "preservation={folder: CLASS, prompt: a heart, images: 1}"],
    "distillation": ["distillation.kind=consistency", "samples.prompts=[a heart]"],
}


@pytest.mark.parametrize("case", OPENED_ONCE)
def test_a_run_opens_the_model_of_init_from_once(case, models, tmp_path, monkeypatch):
    opened, autoencoders, load = [], [], Autoencoder.load

    def count(path, *arguments):
        opened.append(path)
        return open_model(path, *arguments)

    def count_autoencoders(path, *arguments):
        autoencoders.append(path)
        return load(path, *arguments)

    for module in ("stipple.stages.ldm.ldm_run", "ldm.pipeline"):
        monkeypatch.setattr(f"{module}.open_model", count)
    monkeypatch.setattr(Autoencoder, "load", count_autoencoders)
    overrides = [override.replace("CLASS", f"{tmp_path}/class") for override in OPENED_ONCE[case]]
    run_here("train_ldm.py", f"init_from={models}/sd1", PICTURES, f"run={tmp_path}/run", *FEW, *overrides)
    assert opened == [f"{models}/sd1"] and len(autoencoders) == 1


def test_a_stage_1_run_opens_the_autoencoder_of_init_from_once(models, tmp_path, monkeypatch):
    opened, load = [], Autoencoder.load

    def count(path, *arguments):
        opened.append(path)
        return load(path, *arguments)

    monkeypatch.setattr(Autoencoder, "load", count)
    run_here("train_autoencoder.py", f"init_from={models}/sd1", PICTURES, f"run={tmp_path}/run", *STAGE_1,
             "data.image_size=16")  # fmt: skip
    assert opened == [f"{models}/sd1"]


def test_settings_that_do_not_fit_the_model_are_one_line(models, tmp_path, capsys):
    runs = itertools.count()

    def error_of(*arguments):
        run = f"run={tmp_path}/run{next(runs)}"
        return refused(capsys, "train_ldm.py", PICTURES, run, *FEW, *arguments)

    sd1 = f"init_from={models}/sd1"
    wide = error_of(sd1, "unet.block_out_channels=[64, 64]", "unet.attention_heads=[2]")
    assert "unet.block_out_channels is (64, 64), not (64, 128); unet.attention_heads is (2, 2), not (4, 4)" in wide
    assert "unet.norm_eps" in error_of(sd1, "unet.norm_eps=1e-6")
    assert "this model is unconditional; leave it empty" in error_of(f"init_from={models}/unconditional")
    assert "has no null class" in error_of(f"init_from={models}/no null")
    assert "which has num_heads (stipple convert" in error_of(f"init_from={models}/class.safetensors")
    assert "nowhere does not exist" in error_of(f"init_from={tmp_path}/nowhere")
    assert "init_from" in error_of("init_from=5", "autoencoder=x")
    assert not list(tmp_path.glob("run*/model"))


@pytest.mark.parametrize("source", ["sd1", "sd1/vae", "vae.safetensors"])
def test_stage_1_starts_from_model_folders_vae_folders_and_single_files(source, models, tmp_path):
    run_here("train_autoencoder.py", f"init_from={models}/{source}", PICTURES, f"run={tmp_path}/run", *STAGE_1,
             "data.image_size=16")  # fmt: skip
    before, after = Autoencoder.load(models / "sd1"), Autoencoder.load(tmp_path / "run" / "model")
    assert {**vars(after.config), "sample_size": 0} == {**vars(before.config), "sample_size": 0}
    decoder = before.decoder, after.decoder  # the mean of latents is folded into the convolutions around them
    assert 0 < change(*decoder) < 1e-3
    assert after.scaling_factor != before.scaling_factor


def test_an_autoencoder_of_another_shape_is_one_line(models, tmp_path, capsys):
    wide = refused(capsys, "train_autoencoder.py", f"init_from={models}/sd1", PICTURES, f"run={tmp_path}/run", *STAGE_1,
                   "autoencoder.layers_per_block=2")  # fmt: skip
    assert "autoencoder.layers_per_block is 2, not 1; leave out what differs" in wide


def test_overwriting_the_file_of_init_from_does_not_change_the_weights_of_a_run(tmp_path):
    from stipple.stages.ldm.build_model import make_unet
    from stipple.stages.ldm.ldm_run import LdmRunConfig
    from stipple_core.data.records.data_config import DataConfig

    parts, path, yaml = build_parts("sd1", tmp_path), tmp_path / "model.ckpt", write_yaml(tmp_path)
    save_single_file(parts, tmp_path / "model.safetensors")
    torch.save({"state_dict": read_weights(tmp_path / "model.safetensors")}, path)  # this file is mapped into memory
    init = open_model(path, config_yaml=yaml)
    config = LdmRunConfig(init_from=str(path), data=DataConfig(folder=""), autoencoder="", unet=init.unet.config)
    unet = make_unet(config, init)
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)  # in place
    assert change(unet, parts.unet) == 0 and all(parameter.requires_grad for parameter in unet.parameters())


def test_new_input_channels_have_no_effect_at_first(tmp_path):
    from conditioning.conditioners import ConditionerConfig
    from conditioning.hints.hints import SpatialConfig
    from stipple.stages.ldm.build_model import make_unet
    from stipple.stages.ldm.ldm_run import LdmRunConfig
    from stipple_core.data.records.data_config import DataConfig

    init = build_parts("depth", tmp_path)
    torch.nn.init.normal_(init.unet.conv_in.weight)

    def first_weight(kind: str, channels: int) -> torch.Tensor:
        shape = replace(init.unet.config, in_channels=channels)
        spatial = ConditionerConfig(spatial=SpatialConfig(kind=kind))
        config = LdmRunConfig(
            init_from="x", data=DataConfig(folder=""), autoencoder="", unet=shape, conditioner=spatial
        )
        return make_unet(config, init).conv_in.weight

    before = init.unet.conv_in.weight
    completing, same = first_weight("inpainting", 9), first_weight("depth", 5)
    assert torch.equal(completing[:, :4], before[:, :4]) and not completing[:, 4:].any()
    assert torch.equal(same, before)
