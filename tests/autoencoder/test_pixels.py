"""Pixel space: the identity as an autoencoder, and sampling and likelihoods of models in it."""

from __future__ import annotations

import math

import pytest
import torch

from autoencoder import Autoencoder, Pixels, Posterior, open_autoencoder
from ldm import TextToImage
from ldm.denoising.denoiser import Denoiser
from ldm.formats.opening import open_model
from ldm.guidance.thresholding import thresholded
from ldm.likelihood.flow_likelihood import ode_bound
from ldm.likelihood.variational_bound import variational_bound
from ldm.losses.diffusion_loss import loss_weight
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple_core.images.images import image_to_tensor, tensor_to_image
from tests.helpers.models.pixel_models import pixel_model


def images(batch: int = 2, side: int = 16) -> torch.Tensor:
    """Images of 8-bit values, normally distributed with standard deviation 0.3."""
    drawn = 0.3 * torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return ((drawn.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


def test_latents_equal_the_images_also_through_cached_moments():
    pixels, x = Pixels(), images()
    posterior = pixels.encode(x)
    again = Posterior.from_moments(posterior.moments)
    for each in (posterior, again):
        assert torch.equal(each.sample(torch.randn_like(x)), x)
        assert torch.equal(pixels.decode(each.mode()), x)


def test_open_autoencoder_opens_pixels_by_name_and_folder_and_other_autoencoders(tmp_path, autoencoder):
    Pixels().save(tmp_path)
    assert isinstance(open_autoencoder("pixels"), Pixels)
    assert isinstance(open_autoencoder(tmp_path), Pixels) and isinstance(open_autoencoder(tmp_path / "vae"), Pixels)
    assert isinstance(open_autoencoder(autoencoder), Autoencoder)
    with pytest.raises(FileNotFoundError):
        open_autoencoder(tmp_path / "nowhere")


@pytest.mark.parametrize(("sampler", "name"), [("ddpm", "DDPMPipeline"), ("ddim", "DDIMPipeline")])
def test_diffusers_loads_a_pixel_model_with_equal_outputs(tmp_path, sampler, name):
    from diffusers import DiffusionPipeline

    model = pixel_model(sampler)
    model.save(tmp_path)
    reference = DiffusionPipeline.from_pretrained(tmp_path)
    z_t, t = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 900.0])
    assert type(reference).__name__ == name and type(reference.unet).__name__ == "UNet2DModel"
    with torch.no_grad():
        torch.testing.assert_close(reference.unet(z_t, t).sample, model.unet(z_t, t), atol=1e-5, rtol=1e-4)


def test_a_saved_pixel_model_generates_equal_images(tmp_path):
    model = pixel_model(guidance_bound=1.0, guidance_percentile=99.5)
    model.save(tmp_path)
    again = TextToImage.load(tmp_path)
    assert again.defaults.guidance_bound == 1.0 and again.defaults.guidance_percentile == 99.5
    assert isinstance(open_model(tmp_path).autoencoder, Pixels)
    first, second = (image_to_tensor(each("", seed=3)[0]) for each in (model, again))
    assert torch.equal(first, second) and first.shape == (3, 16, 16)


def test_img2img_changes_the_image_more_at_higher_strength():
    model, source = pixel_model(guidance_bound=1.0), images(1)[0]

    def change(strength: float) -> float:
        drawn = model("", image=tensor_to_image(source), strength=strength, steps=20, seed=1)[0]
        return (image_to_tensor(drawn) - source).abs().mean().item()

    assert change(0.05) < 0.5 * change(1.0)


def test_dynamic_thresholding_limits_the_range_and_keeps_images_in_range():
    inside = images()
    assert torch.equal(thresholded(lambda z, t: z, 1.0, 99.5)(inside, 0.5), inside)
    beyond = thresholded(lambda z, t: z, 1.0, 99.5)(4 * inside, 0.5)
    assert beyond.abs().max() <= 1
    static = thresholded(lambda z, t: z, 1.0)(4 * inside, 0.5)
    assert (beyond.abs() == 1).float().mean() < 0.1 * (static.abs() == 1).float().mean()  # not saturated, as in Imagen


def test_both_likelihood_bounds_of_normal_images_equal_those_of_the_distribution():
    schedule, x, variance = make_schedule(ScheduleConfig(name="linear")), images(4), 0.3**2

    def denoise(z_t: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = (level.item() for level in schedule(t))
        return z_t * alpha * variance / (alpha**2 * variance + sigma**2)

    times = torch.linspace(1, 0, 1001, dtype=torch.float64)
    bound = variational_bound(denoise, x, times, schedule, generators(4), decoder="discretized").total
    bits = ode_bound(denoise, x, schedule, generators(4), tolerance=1e-4)
    square = x.square().flatten(1).mean(1)  # [B]
    nats = math.log(2 * math.pi * variance) / 2 + square / (2 * variance) + math.log(127.5)  # of bins 1 / 127.5 wide
    torch.testing.assert_close(bits, nats / math.log(2), atol=0.02, rtol=0)
    assert abs((bound - nats / math.log(2)).mean()) < 0.06  # each draw has an error


@pytest.mark.parametrize("name", ["ve", "linear"])
def test_the_noise_weighting_is_that_of_ncsn_for_scores_and_of_ddpm_for_noise(name):
    schedule, t = make_schedule(ScheduleConfig(name=name)), torch.tensor([0.1, 0.5, 0.9])
    alpha, sigma = schedule(t, torch.float64)
    sigma = sigma / torch.hypot(alpha, sigma)  # as in the inputs of the network
    torch.testing.assert_close(loss_weight(Denoiser(None, schedule, "score"), t, "noise"), sigma**2)
    torch.testing.assert_close(loss_weight(Denoiser(None, schedule, "noise"), t, "noise"), torch.ones_like(sigma))


def test_langevin_steps_per_level_can_be_set_and_have_a_default():
    model, calls = pixel_model(), []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    for corrections, expected in ((None, 16), (2, 7)):
        calls.clear()
        model("", sampler="langevin", steps=4, corrections=corrections)
        assert len(calls) == expected
    with pytest.raises(ValueError, match="corrections 2 does not go with sampler ddim"):
        model("", sampler="ddim", corrections=2)
