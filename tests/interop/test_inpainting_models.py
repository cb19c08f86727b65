"""Trained inpainting models: diffusers makes the same images, and a text model becomes one without a jump."""

import json
from dataclasses import replace

import pytest
import torch

from conditioning.formats.unet_inputs import with_hints
from conditioning.hints.hint_files import Files
from ldm import TextToImage
from ldm.networks.unet import UNet
from stipple_core.images.images import image_to_tensor, tensor_to_image
from tests.helpers.models.hinted_images import draw_with_hints
from tests.helpers.models.small_models import build_model
from tests.helpers.training.tiny_runs import run_here

SIDE = 32
PROMPT, NEGATIVE = "a red heart", "a cat"


def files() -> Files:
    """A picture of whole gray levels, and a mask with a hole that is no multiple of the latents."""
    levels = torch.randint(0, 256, (3, 4, 4), generator=torch.Generator().manual_seed(1)) / 127.5 - 1
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, 5:21, 10:27] = 1
    return Files(image=levels.repeat_interleave(8, 1).repeat_interleave(8, 2), mask=mask)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of Stable Diffusion's kind for inpainting; its autoencoder draws nothing, which diffusers would do."""
    made = build_model(tmp_path_factory.mktemp("encoder"))
    condition = with_hints(made.conditioner, 5, 4, made.autoencoder.downsampling)
    torch.manual_seed(2)
    wide = UNet(replace(made.unet.config, in_channels=9)).requires_grad_(False).eval()
    for parameter in wide.parameters():
        parameter.normal_(std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    with torch.no_grad():
        made.autoencoder.quant_conv.weight[4:] = 0
        made.autoencoder.quant_conv.bias[4:] = -60
    path = tmp_path_factory.mktemp("model")
    TextToImage(made.autoencoder, wide, condition, made.scheduling, made.defaults).save(path)
    return path


def test_diffusers_opens_our_folder_as_an_inpainting_model_and_draws_the_same(folder):
    diffusers = pytest.importorskip("diffusers")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    provided, model = files(), TextToImage.load(folder)
    reference = pipeline(
        PROMPT, negative_prompt=NEGATIVE, image=tensor_to_image(provided.image), mask_image=provided.mask[None],
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), strength=1.0, height=SIDE,
        width=SIDE, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
    ).images[0]  # fmt: skip
    hint = model.conditioner.readers["spatial"].hint.of_files(provided, SIDE, SIDE, torch.Generator())
    settings = dict(steps=4, guidance_scale=3.0, negative_prompt=NEGATIVE, sampler=model.defaults.sampler)
    stipple = draw_with_hints(model, hint, prompt=PROMPT, **settings)[0]
    assert (127.5 * stipple.std()) > 10
    difference = (127.5 * (stipple + 1) - 255 * reference).abs()
    assert difference.mean() < 0.1 and difference.max() < 1


def test_a_folder_of_diffusers_opens_as_an_inpainting_model(folder, tmp_path):
    """Theirs says nothing of what its UNet reads: there is no conditioner/ in it."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "conditioner").exists()
    reader = TextToImage.load(tmp_path).conditioner.readers["spatial"]
    assert reader.config == TextToImage.load(folder).conditioner.readers["spatial"].config


def test_a_text_model_that_is_shown_a_hint_draws_at_first_as_it_did(tmp_path, settings_of_runs):
    made = build_model(tmp_path)
    made.save(tmp_path / "text")
    overrides = [f"init_from={tmp_path / 'text'}", "data.folder=tests/pictures", "data.image_size=32"]
    overrides += ["conditioner.spatial.kind=inpainting", "conditioner.spatial.downsampling=4", "unet.in_channels=9"]
    overrides += ["trainer.steps=1", "trainer.batch_size=2", "optimizer.learning_rate=0", "optimizer.warmup_steps=0"]
    overrides += ["samples.every=0", "validation.every=0", "ema.decay=0", f"run={tmp_path / 'run'}", "cache=null"]
    run_here("train_ldm.py", *overrides)
    model = TextToImage.load(tmp_path / "run" / "model")
    assert model.unet.config.in_channels == 9
    old, new = made.unet.conv_in.weight, model.unet.conv_in.weight
    assert torch.equal(new[:, :4], old) and new[:, 4:].abs().max() == 0
    hint = model.conditioner.readers["spatial"].hint.of_files(files(), SIDE, SIDE, torch.Generator())
    settings = dict(steps=2, guidance_scale=3.0, seed=0, sampler="ddim", height=SIDE, width=SIDE)
    before = made(PROMPT, **settings)[0]
    settings.pop("seed")
    after = draw_with_hints(
        model, hint, prompt=PROMPT, **{k: v for k, v in settings.items() if k not in ("height", "width")}
    )
    assert (127.5 * (after[0] - image_to_tensor(before))).abs().max() <= 0.51
