"""The linear start: initial weights with which the networks compute a linear autoencoder, up to a few percent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.linear import fit
from autoencoder.linear_start import start_linearly

ERROR = 0.05  # relative root mean squared difference between the networks and the linear map


def blobs(count: int = 48, side: int = 32) -> Tensor:
    """Smooth colored blobs on white, whose energy differs from image to image as in drawings."""
    draws = torch.Generator().manual_seed(0)
    colors = torch.rand(count, 3, 1, 1, generator=draws) * 2 - 1
    coarse = torch.rand(count, 1, 4, 4, generator=draws)
    shape = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return 1 + shape * (colors - 1) + 0.02 * torch.randn(count, 3, side, side, generator=draws)


def small(**changes) -> AutoencoderConfig:
    options = {"latent_channels": 8, "block_out_channels": (16, 24, 32), "layers_per_block": 1, "norm_num_groups": 4}
    return AutoencoderConfig(**(options | {"sample_size": 32} | changes))


CONFIGS = {
    "kl f4": small(),
    "one width": small(block_out_channels=(32, 32, 32)),
    "two blocks, no attention": small(layers_per_block=2, mid_attention=False),
    "attention on levels": small(attention_levels=(True, True, True)),
    "groups of 4": small(block_out_channels=(32, 32), norm_num_groups=8),
    "f1": small(block_out_channels=(16,), latent_channels=3),
    "f8, many channels": small(block_out_channels=(16, 32, 64, 64), latent_channels=16),
    "gray": small(in_channels=1),
    "vq": small(regularizer="vq", codebook_size=256),
}


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_networks_compute_the_linear_map_at_first(name):
    config, images = CONFIGS[name], blobs()[:, : CONFIGS[name].in_channels]
    torch.manual_seed(0)
    autoencoder = Autoencoder(config)
    linear = start_linearly(autoencoder, images)
    with torch.no_grad():
        latents = linear.encode(images)
        assert difference(autoencoder.posterior(images).mean, latents) < ERROR
        decoded = autoencoder._decode(latents) + linear.center.bias[:, None, None]
        assert difference(decoded, linear.decode(latents) + linear.center.bias[:, None, None]) < ERROR


def test_latents_are_uncorrelated_with_variance_one():
    images = blobs()
    linear = fit(images, (16, 24, 32), 8)
    vectors = linear.encode(images).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(vectors), torch.eye(8), atol=0.05)


def test_more_latents_have_smaller_errors():
    """The 2x2 cells of the images are independent, so that neighbors can't replace missing latents."""
    images = torch.rand(48, 3, 16, 16).repeat_interleave(2, 2).repeat_interleave(2, 3)
    errors = []
    for channels in (3, 6, 12):
        linear = fit(images, (16, 24, 32), channels)
        errors.append((linear.decode(linear.encode(images)) - images).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_every_parameter_gets_a_gradient():
    """Parameters that scale constants or zeros have none at first, but after two steps."""
    torch.manual_seed(0)
    autoencoder, images = Autoencoder(small()), blobs(8)
    start_linearly(autoencoder, images)
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (autoencoder(images).images - images).abs().mean().backward()
        optimizer.step()
    without = [name for name, p in autoencoder.named_parameters() if not p.grad.abs().sum() > 0]
    assert not without


def test_codes_are_latents_of_images():
    torch.manual_seed(0)
    autoencoder, images = Autoencoder(CONFIGS["vq"]), blobs()
    linear = start_linearly(autoencoder, images)
    with torch.no_grad():
        reconstruction = autoencoder(images).images
    assert difference(reconstruction, images) < 2 * difference(linear.decode(linear.encode(images)), images) + 0.1


def test_a_level_with_too_few_channels_for_pairs_is_refused_in_one_line():
    with pytest.raises(ValueError, match="24 channels in 8 groups have room for 0 features, not 3; use fewer"):
        start_linearly(Autoencoder(small(block_out_channels=(24, 32), norm_num_groups=8)), blobs())
    with pytest.raises(ValueError, match="images of more than one color"):
        start_linearly(Autoencoder(small()), torch.ones(4, 3, 32, 32))
