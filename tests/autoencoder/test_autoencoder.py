"""The autoencoder: agreement with diffusers, the scale of latents, files."""

import json

import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig, LatentStatistics, latent_rgb, preview

SMALL = dict(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=16)
CODEBOOK = dict(regularizer="vq", codebook_size=64)
PAPER = {  # Rombach et al. 2022, table 8: options and numbers of parameters
    "kl-f4": (dict(latent_channels=3, block_out_channels=(128, 256, 512)), 55_312_063),
    "kl-f8": (dict(), 83_653_863),
    "kl-f16": (
        dict(latent_channels=16, block_out_channels=(128, 128, 256, 256, 512), attention_levels=(0, 0, 0, 0, 1)),
        69_610_963,
    ),
    "kl-f32": (
        dict(
            latent_channels=64, block_out_channels=(128, 128, 256, 256, 512, 512), attention_levels=(0, 0, 0, 0, 1, 1)
        ),
        103_880_131,
    ),
    "vq-f4": (dict(regularizer="vq", latent_channels=3, block_out_channels=(128, 256, 512)), 55_322_782),
    "vq-f4-noattn": (
        dict(regularizer="vq", latent_channels=3, block_out_channels=(128, 256, 512), mid_attention=False),
        53_219_486,
    ),
    "vq-f8": (
        dict(
            regularizer="vq",
            codebook_size=16384,
            block_out_channels=(128, 256, 256, 512),
            attention_levels=(0, 0, 0, 1),
        ),
        67_717_295,
    ),
    "vq-f16": (
        dict(
            regularizer="vq",
            codebook_size=16384,
            latent_channels=8,
            block_out_channels=(128, 128, 256, 256, 512),
            attention_levels=(0, 0, 0, 0, 1),
        ),
        69_593_371,
    ),
}


def small(regularizer="kl", seed=0, **options):
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderConfig(**(SMALL | (CODEBOOK if regularizer == "vq" else {}) | options)))


def images(batch=2, height=16, width=24, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=g, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("name", PAPER)
def test_the_autoencoders_of_the_paper_have_its_numbers_of_parameters(name):
    options, count = PAPER[name]
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderConfig(**options))
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == count


VARIANTS = [
    ("kl", (False, False, False), True),
    ("kl", (False, True, True), True),
    ("vq", (False, False, True), True),
    ("vq", (False, False, False), False),
]


@pytest.mark.parametrize("regularizer, attention_levels, mid_attention", VARIANTS)
def test_diffusers_loads_saved_autoencoders_with_equal_outputs_and_gradients(
    regularizer, attention_levels, mid_attention, tmp_path
):
    diffusers = pytest.importorskip("diffusers")
    autoencoder = small(regularizer, attention_levels=attention_levels, mid_attention=mid_attention)
    autoencoder.save(tmp_path)
    reference, report = getattr(diffusers, {"kl": "AutoencoderKL", "vq": "VQModel"}[regularizer]).from_pretrained(
        tmp_path / "vae", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    autoencoder, reference, x = autoencoder.double(), reference.double(), images(dtype=torch.float64)
    x_1, x_2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = autoencoder(x_1).images, reference(x_2).sample
    assert (output - expected).norm() < 1e-5 * expected.norm()
    weight = torch.randn(x.shape, dtype=torch.float64)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (x_1.grad - x_2.grad).norm() < 1e-5 * x_2.grad.norm()
    gradients = dict(reference.named_parameters())
    for name, parameter in autoencoder.named_parameters():
        if not name.startswith("quantize"):  # codes have gradients only of the codebook loss
            assert (parameter.grad - gradients[name].grad).norm() <= 1e-5 * gradients[name].grad.norm() + 1e-9, name


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_autoencoders_of_diffusers_are_loaded(regularizer, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = dict(block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4, layers_per_block=1)
    options |= dict(down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"))
    options |= dict(up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"))
    if regularizer == "kl":
        reference = diffusers.AutoencoderKL(**options, shift_factor=0.3)
    else:
        reference = diffusers.VQModel(**options, num_vq_embeddings=64)
    reference.save_pretrained(tmp_path / "vae")
    autoencoder, x = Autoencoder.load(tmp_path), images()
    assert torch.allclose(autoencoder(x).images, reference(x).sample, atol=1e-5)
    assert autoencoder.scaling_factor == 0.18215
    assert autoencoder.shift_factor == (0.3 if regularizer == "kl" else 0.0)
    latents = autoencoder.encode(x).mode()
    assert torch.allclose(autoencoder.decode(latents), reference(x).sample, atol=1e-4)


def test_latents_are_those_of_diffusers_times_its_scaling_factor(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    autoencoder, x = small(), images()
    autoencoder.set_scale(torch.tensor([0.1, -0.2, 0.3, 0.0]), 0.5)
    autoencoder.save(tmp_path)
    reference = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    expected, scale = reference.encode(x).latent_dist, reference.config.scaling_factor
    assert reference.config.shift_factor is None
    assert torch.allclose(autoencoder.encode(x).mode(), expected.mean * scale, atol=1e-5)
    assert torch.allclose(autoencoder.encode(x).variance, expected.var * scale**2, rtol=1e-4)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_set_scale_makes_latents_unit_scale_and_keeps_reconstructions(regularizer):
    autoencoder, x = small(regularizer).double(), images(batch=8, dtype=torch.float64)
    before = autoencoder(x).images
    statistics = LatentStatistics(autoencoder.latent_channels)
    statistics.update(autoencoder.posterior(x[:5]))
    statistics.update(autoencoder.posterior(x[5:]))
    autoencoder.set_scale(statistics.mean, statistics.std)
    assert torch.allclose(autoencoder(x).images, before, atol=1e-6)
    assert torch.allclose(autoencoder.decode(autoencoder.encode(x).mode()), before, atol=1e-6)
    again = LatentStatistics(autoencoder.latent_channels)
    again.update(autoencoder.encode(x))
    assert again.mean.abs().max() < 1e-10 and again.std == pytest.approx(1.0, rel=1e-10)


def test_statistics_are_those_of_sampled_latents():
    posterior = small().double().posterior(images(batch=4, dtype=torch.float64))
    statistics = LatentStatistics(4)
    statistics.update(posterior)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, *posterior.mean.shape, generator=g, dtype=torch.float64)
    samples = torch.stack([posterior.sample(n) for n in noise]).flatten(0, 1)
    assert torch.allclose(statistics.mean, samples.mean(dim=(0, 2, 3)), atol=0.01)
    assert statistics.std == pytest.approx(samples.var(dim=(0, 2, 3)).mean().sqrt().item(), rel=0.01)


def test_statistics_without_data_and_a_scale_of_zero_are_errors():
    with pytest.raises(ValueError, match="0 batches"):
        _ = LatentStatistics(4).mean
    with pytest.raises(ValueError, match="std 0.0 is not a positive"):
        small().set_scale(0.0, 0.0)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_save_and_load_give_the_same_autoencoder_bit_for_bit(regularizer, tmp_path):
    options = dict(commitment=0.5, codebook_dim=3) if regularizer == "vq" else {}
    autoencoder, x = small(regularizer, attention_levels=(False, False, True), **options), images()
    autoencoder.set_scale(0.1, 2.5)
    autoencoder.latent_rgb = torch.randn(5, 3)
    autoencoder.save(tmp_path)
    again = Autoencoder.load(tmp_path)
    assert again.config == autoencoder.config and again.scaling_factor == autoencoder.scaling_factor
    assert torch.equal(again.latent_rgb, autoencoder.latent_rgb)
    assert torch.equal(again.decode(again.encode(x).mode()), autoencoder.decode(autoencoder.encode(x).mode()))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_half_precision_files_have_half_the_size_and_close_results(tmp_path):
    autoencoder, x = small(), images()
    autoencoder.save(tmp_path / "full")
    autoencoder.save(tmp_path / "half", dtype=torch.float16)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "half" / name).stat().st_size < 0.6 * (tmp_path / "full" / name).stat().st_size
    again = Autoencoder.load(tmp_path / "half")
    assert again.last_layer.dtype == torch.float32
    assert torch.allclose(again(x).images, autoencoder(x).images, atol=0.02)


def change_options(folder, **changes):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES = [
    ({"patch_size": 2}, "'patch_size' .* is unknown"),
    ({"use_quant_conv": False}, "'use_quant_conv' .* is False; only True"),
    ({"down_block_types": ["DownBlock2D"] * 3}, "'DownBlock2D' is unknown"),
    ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "do not mirror"),
    ({"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny' is not a supported autoencoder"),
    ({"layers_per_block": 2}, "does not fit its configuration: .* is missing"),
]


@pytest.mark.parametrize("changes, message", CHANGES)
def test_the_error_for_unsupported_files_names_the_option(changes, message, tmp_path):
    small().save(tmp_path)
    change_options(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Autoencoder.load(tmp_path)


def test_a_folder_without_an_autoencoder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        Autoencoder.load(tmp_path)


def test_the_error_for_an_indivisible_size_suggests_sizes():
    with pytest.raises(ValueError, match=r"image size 18 is not divisible by 4 \(autoencoder .*\); use 16 or 20"):
        small().encode(images(height=18))


BAD_OPTIONS = [
    (dict(regularizer="gumbel"), "'gumbel' is unknown; use 'kl' or 'vq'"),
    (dict(attention_levels=(True,)), "1 entries for 3 levels"),
    (dict(block_out_channels=(12,)), "12 is not divisible by norm_num_groups 8; use 16"),
    (dict(block_out_channels=()), "is empty"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**(SMALL | options))


def test_latents_of_a_codebook_are_quantized_when_decoded():
    autoencoder, x = small("vq"), images()
    autoencoder.set_scale(0.0, 0.1)
    posterior = autoencoder.encode(x)
    assert torch.equal(posterior.sample(torch.randn_like(posterior.mean)), posterior.mode())
    nudged = posterior.mode() * (1 + 1e-6)
    assert torch.allclose(autoencoder.decode(nudged), autoencoder(x).images, atol=1e-4)


def test_noise_samples_the_posterior_and_none_uses_its_mode():
    autoencoder, x = small(), images()
    noise = torch.randn(2, 4, 4, 6)
    sampled = autoencoder.decode(autoencoder.posterior(x).sample(noise))
    assert torch.allclose(autoencoder(x, noise).images, sampled)
    assert torch.allclose(autoencoder(x).images, autoencoder(x, torch.zeros_like(noise)).images)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_posteriors_are_float32_in_low_precision(regularizer):
    autoencoder, x = small(regularizer), images()
    expected = autoencoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = autoencoder(x)
        decoded = autoencoder.decode(autoencoder.encode(x).mode())
    low = autoencoder.to(torch.bfloat16)(x.bfloat16())
    for reconstruction in (mixed, low):
        assert reconstruction.posterior.mean.dtype == torch.float32
        assert (reconstruction.posterior.mean - expected.posterior.mean).abs().max() < 0.05
    assert torch.equal(decoded, mixed.images) and low.images.dtype == torch.bfloat16


def test_checkpointing_and_channels_last_do_not_change_gradients():
    autoencoder, x = small(attention_levels=(False, True, True)).double(), images(dtype=torch.float64)
    gradients = []
    for checkpointing, layout in ((False, torch.contiguous_format), (True, torch.channels_last)):
        autoencoder.checkpointing = checkpointing
        autoencoder = autoencoder.to(memory_format=layout)
        autoencoder.zero_grad()
        autoencoder(x.contiguous(memory_format=layout)).images.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in autoencoder.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_the_preview_matrix_recovers_colors_that_are_linear_in_the_latents():
    latents = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    matrix = 0.1 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    small_images = preview(latents, matrix)
    assert small_images.abs().max() < 1
    pixels = small_images.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    assert torch.allclose(latent_rgb(latents, pixels), matrix, atol=1e-4)


@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_the_fingerprint_does_not_depend_on_the_precision_of_files_and_weights(tmp_path, saved):
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    autoencoder.save(tmp_path, saved)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert Autoencoder.load(tmp_path, dtype=dtype).fingerprint() == autoencoder.fingerprint()
    with torch.no_grad():
        autoencoder.quant_conv.weight.mul_(1.01)
    assert Autoencoder.load(tmp_path).fingerprint() != autoencoder.fingerprint()
