"""The linear start: networks that do what a linear autoencoder does, at the first step, to a few percent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.linear import fit
from autoencoder.linear_start import start_linearly

ERROR = 0.05  # of the networks against the linear map, relative, in root mean squares


def pictures(count: int = 48, side: int = 32) -> Tensor:
    """Smooth colored blobs on white, whose energy differs from picture to picture as that of drawings does."""
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
def test_the_networks_begin_as_the_linear_map(name):
    config, images = CONFIGS[name], pictures()[:, : CONFIGS[name].in_channels]
    torch.manual_seed(0)
    autoencoder = Autoencoder(config)
    linear = start_linearly(autoencoder, images)
    with torch.no_grad():
        latents = linear.encode(images)
        assert difference(autoencoder.posterior(images).mean, latents) < ERROR
        drawn = autoencoder._draw(latents) + linear.center.bias[:, None, None]
        assert difference(drawn, linear.decode(latents) + linear.center.bias[:, None, None]) < ERROR


def test_latents_are_uncorrelated_with_variance_one():
    images = pictures()
    linear = fit(images, (16, 24, 32), 8)
    vectors = linear.encode(images).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(vectors), torch.eye(8), atol=0.05)


def test_the_more_latents_the_nearer_the_linear_map():
    """Of pictures whose cells have nothing to do with one another, so that neighbors can't tell what latents don't."""
    images = torch.rand(48, 3, 16, 16).repeat_interleave(2, 2).repeat_interleave(2, 3)
    errors = []
    for channels in (3, 6, 12):
        linear = fit(images, (16, 24, 32), channels)
        errors.append((linear.decode(linear.encode(images)) - images).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_every_weight_can_learn():
    """After two steps every parameter has a gradient but those that only scale what is constant or zero."""
    torch.manual_seed(0)
    autoencoder, images = Autoencoder(small()), pictures(8)
    start_linearly(autoencoder, images)
    optimizer = torch.optim.Adam(autoencoder.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (autoencoder(images).images - images).abs().mean().backward()
        optimizer.step()
    still = [name for name, p in autoencoder.named_parameters() if not p.grad.abs().sum() > 0]
    assert not still


def test_codes_are_latents_of_pictures():
    torch.manual_seed(0)
    autoencoder, images = Autoencoder(CONFIGS["vq"]), pictures()
    linear = start_linearly(autoencoder, images)
    with torch.no_grad():
        reconstruction = autoencoder(images).images
    assert difference(reconstruction, images) < 2 * difference(linear.decode(linear.encode(images)), images) + 0.1


def test_a_level_too_narrow_for_pairs_is_refused_in_one_line():
    with pytest.raises(ValueError, match="24 channels in 8 groups have room for 0 features, not 3; use fewer"):
        start_linearly(Autoencoder(small(block_out_channels=(24, 32), norm_num_groups=8)), pictures())
    with pytest.raises(ValueError, match="pictures that differ"):
        start_linearly(Autoencoder(small()), torch.ones(4, 3, 32, 32))
