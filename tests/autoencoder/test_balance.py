"""Balanced latents: reconstructions do not change, and an error in any latent has the same effect on the image."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.balance import balance, sensitivity
from autoencoder.linear_start import start_linearly

SMALL = dict(latent_channels=6, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, sample_size=16)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    """Sums of noise at several scales, with smaller amplitudes at finer scales."""
    sizes = (2, 4, 8, 16)
    parts = [torch.randn(24, 3, size, size, generator=draws()) / size for size in sizes]
    return sum(torch.nn.functional.interpolate(part, size=16) for part in parts).clamp(-1, 1)


@pytest.fixture
def autoencoder(images) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(**SMALL))
    start_linearly(model, images)
    return model


def test_reconstructions_do_not_change_and_latents_are_multiplied_by_the_matrix(autoencoder, images):
    before = copy.deepcopy(autoencoder)
    matrix = balance(autoencoder, images, draws())
    with torch.no_grad():
        assert torch.allclose(autoencoder(images).images, before(images).images, atol=1e-3)
        mixed = torch.einsum("dc,bchw->bdhw", matrix.float(), before.posterior(images).mode())
        assert torch.allclose(autoencoder.posterior(images).mode(), mixed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("degree", [0.0, 0.5, 1.0])
def test_the_sensitivity_becomes_that_to_the_power_of_one_minus_the_degree(degree, autoencoder, images):
    before = torch.linalg.eigvalsh(sensitivity(autoencoder, images, draws()))
    balance(autoencoder, images, draws(), degree)
    after = torch.linalg.eigvalsh(sensitivity(autoencoder, images, draws()))
    assert torch.allclose(after, before ** (1 - degree), rtol=0.15)
    assert before.max() > 5 * before.min()


def test_the_variances_of_the_posterior_are_those_of_the_mixture(autoencoder, images):
    before = autoencoder.posterior(images).variance.mean(dim=(0, 2, 3))
    matrix = balance(autoencoder, images, draws())
    after = autoencoder.posterior(images).variance
    assert torch.allclose(after, (matrix.float().square() @ before)[:, None, None].expand_as(after), rtol=1e-3)


def test_a_codebook_is_refused(images):
    autoencoder = Autoencoder(AutoencoderConfig(regularizer="vq", codebook_size=16, **SMALL))
    with pytest.raises(ValueError, match="latents of a codebook can't be balanced"):
        balance(autoencoder, images, draws())
