"""Tests of two text encoders and the frame: folders in SDXL's layout, from which diffusers draws the same picture."""

import copy
import json

import numpy as np
import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig
from conditioning import ConditionerConfig, TransformerConfig, build_conditioner, load_conditioner
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.frame import FrameConfig
from conditioning.text.two_encoders import SecondEncoderConfig
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.pipeline import TextToImage
from ldm.sampling.settings import Settings
from ldm.schedules.noise_schedule import ScheduleConfig
from stipple.stages.ldm.trainable import InversionConfig, LoraConfig, make_trainable
from stipple_core.data.records.records import Record
from tests.helpers.training.tiny_runs import launch, run_here

CAPTIONS = ["a red circle above a blue square", "a blue circle below a red one"]
FRAME = torch.tensor([[100.0, 80.0, 3.0, 4.0, 64.0, 48.0]])
ONE = TransformerConfig(vocab_size=560, width=16, layers=2, heads=2, max_length=77)
TWO = TransformerConfig(vocab_size=560, width=24, layers=3, heads=2, max_length=77)
SECOND = SecondEncoderConfig(kind="scratch", scratch=TWO)
CONFIG = ConditionerConfig(kind="scratch", scratch=ONE, second=SECOND, frame=FrameConfig(width=8))
SHAPE = UNetConfig(
    sample_size=4,
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_levels=(True, True),
    attention_heads=(2, 4),
    cross_attention_dim=16 + 24,
    transformer_layers=(1, 2),
    use_linear_projection=True,
    vector_dim=24 + 6 * 8,
    frame_width=8,
    norm_num_groups=8,
)


@pytest.fixture(scope="module")
def model() -> TextToImage:
    torch.manual_seed(0)
    small = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_attention=False)
    unet = UNet(SHAPE)
    for parameter in unet.parameters():  # the output of a new network is 0 for any input
        torch.nn.init.normal_(parameter, std=0.2)
    scheduling = Scheduling(schedule=ScheduleConfig(name="scaled_linear"), prediction="noise", spacing="leading")
    conditioner = build_conditioner(CONFIG, CAPTIONS)
    defaults = Settings(sampler="ddim", steps=3, guidance_scale=3.0)
    return TextToImage(Autoencoder(small).eval(), unet.eval(), conditioner.eval(), scheduling, defaults)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("xl")
    model.save(path)
    return str(path)


def test_diffusers_draws_the_same_picture_from_the_folder(model, folder, recwarn):
    from diffusers import StableDiffusionXLPipeline

    diffusers_model = StableDiffusionXLPipeline.from_pretrained(folder)
    diffusers_model.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 8, "width": 8}
    expected = diffusers_model(CAPTIONS[0], negative_prompt="", latents=z, **options)
    opened = TextToImage.load(folder)
    (drawn,) = opened(CAPTIONS[0], seed=7)
    difference = np.abs(np.asarray(drawn, float) - np.asarray(expected.images[0], float))
    assert difference.max() <= 1 and np.asarray(drawn).std() > 5
    frames = torch.tensor([[8.0, 8, 0, 0, 8, 8], [8, 8, 2, 0, 8, 8]])
    with torch.no_grad():
        context = opened.conditioner.encode([CAPTIONS[0]] * 2, ConditionInputs(prompts=[CAPTIONS[0]] * 2, frame=frames))
        output = opened.unet(z.expand(2, -1, -1, -1), torch.tensor([500.0, 500]), context)
    assert (output[0] - output[1]).abs().max() > 1e-3  # the frame is read


def test_tokens_and_pooled_output_are_those_of_transformers(model, folder):
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    prompts = ["a red circle", "", "a blue square"]
    states = []
    for kind, suffix in ((CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2")):
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer{suffix}")
        ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states.append(kind.from_pretrained(f"{folder}/text_encoder{suffix}")(ids, output_hidden_states=True))
    with torch.no_grad():
        context = model.conditioner.encode(prompts, ConditionInputs(prompts=prompts, frame=FRAME.expand(3, -1)))
    tokens = torch.cat([state.hidden_states[-2] for state in states], dim=-1)  # [B, L, 16 + 24]
    torch.testing.assert_close(context.tokens, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(context.vector[:, :24], states[1].text_embeds, rtol=0, atol=1e-5)


def test_both_encoders_are_trained_with_the_frames_of_random_crops(settings_of_runs, autoencoder, tmp_path):
    few = ["trainer.steps=2", "trainer.save_every=2", "trainer.batch_size=4", "samples.every=0", "validation.every=0"]
    data = ["data.folder=tests/pictures", "data.crop=random", "data.validation=0.2", f"autoencoder={autoencoder}"]
    run = f"run={tmp_path}/run"
    run_here("train_ldm.py", "--config", "configs/ldm/sdxl-small.yaml", *data, run, *few, "samples.prompts=[a heart]")
    opened = TextToImage.load(tmp_path / "run" / "model")
    assert opened.conditioner.prompts.trainable and list(opened.conditioner.readers) == ["frame"]
    index = json.loads((tmp_path / "run/model/model_index.json").read_text())
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]


def test_the_frame_is_embedded_as_in_diffusers(model):
    from diffusers.models.embeddings import Timesteps

    context = model.conditioner.encode([""], ConditionInputs(prompts=[""], frame=FRAME))
    embedded = Timesteps(8, flip_sin_to_cos=True, downscale_freq_shift=0)(FRAME.flatten()).flatten()
    torch.testing.assert_close(context.vector[0, 24:], embedded)


def test_both_encoders_load_back_equal(model, folder):
    with torch.no_grad():
        inputs = ConditionInputs(prompts=CAPTIONS, frame=FRAME.expand(2, -1))
        loaded = load_conditioner(folder).eval().encode(CAPTIONS, inputs)
        before = model.conditioner.encode(CAPTIONS, inputs)
    assert torch.equal(loaded.tokens, before.tokens) and torch.equal(loaded.vector, before.vector)


def test_force_zeros_for_empty_prompt_in_a_folder_is_applied(folder, tmp_path):
    import shutil

    path = shutil.copytree(folder, tmp_path / "zeros")
    index = json.loads((path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is False
    (path / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": True}))
    conditioner = TextToImage.load(path).conditioner
    with torch.no_grad():
        context = conditioner.encode(["", "a red circle"], ConditionInputs(prompts=["", ""], frame=FRAME.expand(2, -1)))
    assert not context.tokens[0].any() and not context.vector[0, :24].any() and context.vector[0, 24:].any()
    assert context.tokens[1].any() and context.vector[1, :24].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "class"}, "conditioner.kind 'class' is not a text encoder"),
        ({"layer": "penultimate"}, "layer and final_norm can't be set for two text encoders"),
        ({"scratch": TransformerConfig(vocab_size=560, width=16, layers=1, heads=2, max_length=8)}, "8 and 77 tokens"),
    ],
)
def test_options_that_two_encoders_can_not_have_raise_in_one_line(change, message):
    from dataclasses import replace

    with pytest.raises(ValueError, match=message) as error:
        build_conditioner(replace(CONFIG, **change), CAPTIONS)
    assert "\n" not in str(error.value)


def test_all_trainable_parameters_of_both_encoders_get_gradients():
    """DistributedDataParallel would wait for missing gradients forever."""
    conditioner = build_conditioner(CONFIG, CAPTIONS)
    trained = {name: p for name, p in conditioner.named_parameters() if p.requires_grad}
    context = conditioner.encode(CAPTIONS, ConditionInputs(prompts=CAPTIONS, frame=FRAME.expand(2, -1)))
    (context.tokens.square().sum() + context.vector.square().sum()).backward()
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert any(".first." in name for name in trained) and any("layers.0" in name for name in trained)


@pytest.mark.slow
def test_two_processes_train_both_encoders(autoencoder, tmp_path):
    few = ["trainer.steps=3", "trainer.save_every=3", "trainer.batch_size=4", "samples.every=0", "validation.every=0"]
    data = ["data.folder=tests/pictures", "data.validation=0.2", f"autoencoder={autoencoder}", f"run={tmp_path}/run"]
    sdxl = ["train_ldm.py", "--config", "configs/ldm/sdxl-small.yaml"]
    launch(*sdxl, *data, *few, "samples.prompts=[a heart]", processes=2)
    assert (tmp_path / "run/model/model_index.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora": LoraConfig(targets=["to_q"], text_encoder=True)},
            "text_encoder=true is not supported for models with two text encoders",
        ),
        (
            {"inversion": InversionConfig(token="<toy>", initial="red")},
            "a new word requires a model with exactly one text encoder",
        ),
    ],
    ids=["lora", "inversion"],
)
def test_fine_tuning_of_one_text_encoder_raises_for_two(model, options, message):
    fine_tuning = make_trainable(**{"lora": None, "inversion": None, **options}, source="FOLDER")
    records = [Record("a.png", "a.png", (("a <toy>",),), 1)]
    with pytest.raises(ValueError, match=message):
        fine_tuning.prepare(copy.deepcopy(model), records, 0)
