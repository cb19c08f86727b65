"""Claims about folders that diffusers' pipelines write: they open by their own names, and draw what they draw there."""

import json

import numpy as np
import pytest
import torch

from ldm.formats.model_folder import save_model
from ldm.formats.opening import open_model
from ldm.pipeline import TextToImage
from stipple_core.files.weights import OLD_ATTENTION, read_weights, write_weights
from tests.helpers.models.single_files import UNET, VAE, build_parts

diffusers = pytest.importorskip("diffusers")
NEW = {stipple: old for old, stipple in OLD_ATTENTION.items()}
SCHEDULER = dict(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False, steps_offset=1)


def randomized(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return module.eval()


def vq_model():
    """A small VQModel with random codes."""
    levels = len(VAE["block_out_channels"])
    return randomized(
        diffusers.VQModel(
            block_out_channels=VAE["block_out_channels"],
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=4,
            num_vq_embeddings=64,
            layers_per_block=1,
            scaling_factor=1.0,
        ),
        seed=1,
    )


def unet_2d():
    return randomized(
        diffusers.UNet2DModel(
            sample_size=UNET["sample_size"],
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            attention_head_dim=32,
        ),
        seed=2,
    )


@pytest.fixture(scope="module")
def ldm_folder(tmp_path_factory):
    """What diffusers' unconditional LDMPipeline saves: vqvae/, a UNet2DModel, no text encoder."""
    folder = tmp_path_factory.mktemp("ldm")
    diffusers.LDMPipeline(vq_model(), unet_2d(), diffusers.DDIMScheduler(**SCHEDULER)).save_pretrained(folder)
    return folder


def pixels(image):
    return np.asarray(image).astype(int)


def test_an_unconditional_folder_of_diffusers_draws_what_its_own_pipeline_draws(ldm_folder):
    reference = diffusers.LDMPipeline.from_pretrained(ldm_folder)
    reference.set_progress_bar_config(disable=True)
    expected = reference(generator=torch.Generator().manual_seed(5), num_inference_steps=4).images[0]
    model = TextToImage.load(ldm_folder)
    image = model("", steps=4, seed=5, sampler="ddim")[0]
    assert np.abs(pixels(image) - pixels(expected)).max() <= 1 and pixels(expected).std() > 5


def test_attention_under_its_old_names_is_read(ldm_folder, tmp_path):
    import shutil

    shutil.copytree(ldm_folder, tmp_path / "old")
    for part in ("unet", "vqvae"):
        path = tmp_path / "old" / part / "diffusion_pytorch_model.safetensors"
        old = {}
        for name, value in read_weights(path).items():
            module, _, kind = name.rpartition(".")
            layer = next((layer for layer in NEW if module.endswith(f".{layer}") and "attentions" in name), None)
            old[name if layer is None else f"{module.removesuffix(layer)}{NEW[layer]}.{kind}"] = value.clone()
        assert any(name.endswith("proj_attn.bias") for name in old)
        write_weights(old, path)
    new, old = open_model(ldm_folder), open_model(tmp_path / "old")
    assert all(torch.equal(value, new.unet.state_dict()[name]) for name, value in old.unet.state_dict().items())


def test_weights_of_a_variant_and_pickled_ones_open_too(tmp_path):
    parts = build_parts("class", tmp_path / "words")
    save_model(parts, tmp_path / "half", torch.float16)
    for path in list((tmp_path / "half").rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    save_model(parts, tmp_path / "pickled")
    for path in list((tmp_path / "pickled").rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else f"{path.stem}.bin"
        torch.save(read_weights(path), path.with_name(name))
        path.unlink()
    half, pickled = TextToImage.load(tmp_path / "half", variant="fp16"), TextToImage.load(tmp_path / "pickled")
    assert torch.equal(pickled.unet.conv_in.weight, parts.unet.conv_in.weight)
    assert torch.allclose(half.unet.conv_in.weight, parts.unet.conv_in.weight, atol=1e-3)
    assert half.unet.conv_in.weight.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match=r"no model.bf16.safetensors in .*; there are .*fp16"):
        TextToImage.load(tmp_path / "half", variant="bf16")


def test_an_option_that_is_not_implemented_is_named(ldm_folder, tmp_path):
    import shutil

    shutil.copytree(ldm_folder, tmp_path / "x")
    path = tmp_path / "x" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"act_fn": "gelu"}))
    with pytest.raises(ValueError, match="act_fn") as caught:
        TextToImage.load(tmp_path / "x")
    assert "\n" not in str(caught.value)
