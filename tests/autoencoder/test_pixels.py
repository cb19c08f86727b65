"""Pixel space: the autoencoder that is the identity, and what is measured and drawn in it."""

from __future__ import annotations

import math

import pytest
import torch

from autoencoder import Autoencoder, Pixels, Posterior, open_autoencoder
from conditioning.classes.class_conditioner import Unconditional
from ldm import TextToImage
from ldm.denoising.denoiser import Denoiser
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.formats.opening import open_model
from ldm.guidance.base import thresholded
from ldm.likelihood.flow_likelihood import ode_bound
from ldm.likelihood.variational_bound import variational_bound
from ldm.losses.diffusion_loss import loss_weight
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.sampling.settings import Settings
from ldm.schedules.base import ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple_core.images.images import image_to_tensor, tensor_to_image

SHAPE = UNetConfig(
    sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, attention="plain",
    attention_levels=(False, True), attention_heads=(1,), cross_attention_dim=None, norm_num_groups=4,
)  # fmt: skip


def model(sampler: str = "ddim", **settings) -> TextToImage:
    torch.manual_seed(0)
    unet = UNet(SHAPE)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.2)
    scheduling = Scheduling(schedule=ScheduleConfig(name="linear"), prediction="noise", sampler=sampler)
    defaults = Settings(sampler=sampler, steps=4, guidance_scale=1.0, **settings)
    return TextToImage(Pixels().eval(), unet.eval(), Unconditional(), scheduling, defaults)


def images(batch: int = 2, side: int = 16) -> torch.Tensor:
    """Values of 8 bits, normal with deviation 0.3."""
    drawn = 0.3 * torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return ((drawn.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


def test_latents_are_the_pictures_bit_for_bit_also_through_cached_moments():
    pixels, given = Pixels(), images()
    posterior = pixels.encode(given)
    again = Posterior.from_moments(posterior.moments)
    for each in (posterior, again):
        assert torch.equal(each.sample(torch.randn_like(given)), given)
        assert torch.equal(pixels.decode(each.mode()), given)


def test_one_door_opens_pixels_by_name_pixels_by_folder_and_autoencoders(tmp_path, autoencoder):
    Pixels().save(tmp_path)
    assert isinstance(open_autoencoder("pixels"), Pixels)
    assert isinstance(open_autoencoder(tmp_path), Pixels) and isinstance(open_autoencoder(tmp_path / "vae"), Pixels)
    assert isinstance(open_autoencoder(autoencoder), Autoencoder)
    with pytest.raises(FileNotFoundError):
        open_autoencoder(tmp_path / "nowhere")


@pytest.mark.parametrize(("sampler", "name"), [("ddpm", "DDPMPipeline"), ("ddim", "DDIMPipeline")])
def test_diffusers_opens_a_model_of_pixels_and_its_network_says_the_same(tmp_path, sampler, name):
    from diffusers import DiffusionPipeline

    ours = model(sampler)
    ours.save(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(tmp_path)
    z_t, t = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 900.0])
    assert type(theirs).__name__ == name and type(theirs.unet).__name__ == "UNet2DModel"
    with torch.no_grad():
        torch.testing.assert_close(theirs.unet(z_t, t).sample, ours.unet(z_t, t), atol=1e-5, rtol=1e-4)


def test_a_model_of_pixels_draws_the_same_when_it_is_opened_again(tmp_path):
    ours = model(guidance_bound=1.0, guidance_percentile=99.5)
    ours.save(tmp_path)
    again = TextToImage.load(tmp_path)
    assert again.defaults.guidance_bound == 1.0 and again.defaults.guidance_percentile == 99.5
    assert isinstance(open_model(tmp_path).autoencoder, Pixels)
    first, second = (image_to_tensor(each("", seed=3)[0]) for each in (ours, again))
    assert torch.equal(first, second) and first.shape == (3, 16, 16)


def test_img2img_of_little_strength_keeps_the_picture_and_of_much_does_not():
    ours, given = model(guidance_bound=1.0), images(1)[0]

    def change(strength: float) -> float:
        drawn = ours("", image=tensor_to_image(given), strength=strength, steps=20, seed=1)[0]
        return (image_to_tensor(drawn) - given).abs().mean().item()

    assert change(0.05) < 0.5 * change(1.0)


def test_dynamic_thresholding_keeps_pictures_in_range_and_those_that_are_in_range_as_they_are():
    inside = images()
    assert torch.equal(thresholded(lambda z, t: z, 1.0, 99.5)(inside, 0.5), inside)
    beyond = thresholded(lambda z, t: z, 1.0, 99.5)(4 * inside, 0.5)
    assert beyond.abs().max() <= 1
    static = thresholded(lambda z, t: z, 1.0)(4 * inside, 0.5)
    assert (beyond.abs() == 1).float().mean() < 0.1 * (static.abs() == 1).float().mean()  # Imagen: it is not saturated


def test_both_bounds_of_normal_pictures_are_what_they_cost_under_the_normal_distribution():
    schedule, given, variance = make_schedule(ScheduleConfig(name="linear")), images(4), 0.3**2

    def denoise(z_t: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = (level.item() for level in schedule(t))
        return z_t * alpha * variance / (alpha**2 * variance + sigma**2)

    walked = torch.linspace(1, 0, 1001, dtype=torch.float64)
    bound = variational_bound(denoise, given, walked, schedule, generators(4), decoder="discretized").total
    bits = ode_bound(denoise, given, schedule, generators(4), tolerance=1e-4)
    square = given.square().flatten(1).mean(1)  # [B]
    nats = math.log(2 * math.pi * variance) / 2 + square / (2 * variance) + math.log(127.5)  # of bins 1 / 127.5 wide
    torch.testing.assert_close(bits, nats / math.log(2), atol=0.02, rtol=0)
    assert abs((bound - nats / math.log(2)).mean()) < 0.06  # each of its draws costs a little more or less


@pytest.mark.parametrize("name", ["ve", "linear"])
def test_the_weighting_of_noise_is_ncsns_of_the_score_and_ddpms_of_the_noise(name):
    schedule, t = make_schedule(ScheduleConfig(name=name)), torch.tensor([0.1, 0.5, 0.9])
    alpha, sigma = schedule(t, torch.float64)
    sigma = sigma / torch.hypot(alpha, sigma)  # as the network meets it
    torch.testing.assert_close(loss_weight(Denoiser(None, schedule, "score"), t, "noise"), sigma**2)
    torch.testing.assert_close(loss_weight(Denoiser(None, schedule, "noise"), t, "noise"), torch.ones_like(sigma))


def test_langevin_steps_per_level_can_be_chosen_and_are_the_samplers_own_otherwise():
    ours, calls = model(), []
    ours.unet.register_forward_hook(lambda *_: calls.append(1))
    for corrections, expected in ((None, 16), (2, 7)):
        calls.clear()
        ours("", sampler="langevin", steps=4, corrections=corrections)
        assert len(calls) == expected
    with pytest.raises(ValueError, match="corrections 2 does not go with sampler ddim"):
        ours("", sampler="ddim", corrections=2)
