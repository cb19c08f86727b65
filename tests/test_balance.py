"""Balanced latents: reconstructions stay, and an error in any latent shows alike in the picture."""

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
def pictures() -> Tensor:
    """Coarse structure with less and less of finer."""
    sizes = (2, 4, 8, 16)
    parts = [torch.randn(24, 3, size, size, generator=draws()) / size for size in sizes]
    return sum(torch.nn.functional.interpolate(part, size=16) for part in parts).clamp(-1, 1)


@pytest.fixture
def autoencoder(pictures) -> Autoencoder:
    torch.manual_seed(0)
    made = Autoencoder(AutoencoderConfig(**SMALL))
    start_linearly(made, pictures)
    return made


def test_reconstructions_stay_and_latents_are_mixed(autoencoder, pictures):
    before = copy.deepcopy(autoencoder)
    turn = balance(autoencoder, pictures, draws())
    with torch.no_grad():
        assert torch.allclose(autoencoder(pictures).images, before(pictures).images, atol=1e-3)
        mixed = torch.einsum("dc,bchw->bdhw", turn.float(), before.posterior(pictures).mode())
        assert torch.allclose(autoencoder.posterior(pictures).mode(), mixed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("degree", [0.0, 0.5, 1.0])
def test_the_sensitivity_becomes_that_to_the_power_of_one_minus_the_degree(degree, autoencoder, pictures):
    before = torch.linalg.eigvalsh(sensitivity(autoencoder, pictures, draws()))
    balance(autoencoder, pictures, draws(), degree)
    after = torch.linalg.eigvalsh(sensitivity(autoencoder, pictures, draws()))
    assert torch.allclose(after, before ** (1 - degree), rtol=0.15)
    assert before.max() > 5 * before.min()


def test_variances_of_the_posterior_are_those_of_the_mixture(autoencoder, pictures):
    before = autoencoder.posterior(pictures).variance.mean(dim=(0, 2, 3))
    turn = balance(autoencoder, pictures, draws())
    after = autoencoder.posterior(pictures).variance
    assert torch.allclose(after, (turn.float().square() @ before)[:, None, None].expand_as(after), rtol=1e-3)


def test_a_codebook_is_refused(pictures):
    autoencoder = Autoencoder(AutoencoderConfig(regularizer="vq", codebook_size=16, **SMALL))
    with pytest.raises(ValueError, match="latents of a codebook can't be balanced"):
        balance(autoencoder, pictures, draws())
