"""unCLIP's prior as a network: diffusers' PriorTransformer, called like a UNet."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from autoencoder import ImageEmbeddings, Pixels
from conditioning.interface.context import Context
from ldm.formats.diffusers.networks_folder import load_unet, save_unet
from ldm.formats.diffusers.prior_options import prior_from_diffusers, prior_to_diffusers
from ldm.networks.cached_unet import CachedUNet
from ldm.networks.prior import PriorTransformer
from ldm.networks.prior_config import PriorConfig
from stipple.stages.ldm.denoiser_validation import SamplesConfig
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple.stages.ldm.shapes import check_shapes
from stipple_core.data.records.data_config import DataConfig

CONFIG = PriorConfig(embedding_dim=8, token_dim=8, vector_dim=8, text_tokens=5, layers=2, heads=2, head_dim=6)


@pytest.fixture(scope="module")
def prior() -> PriorTransformer:
    torch.manual_seed(0)
    prior = PriorTransformer(CONFIG).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


def condition(mask: bool = False) -> Context:
    draws = torch.Generator().manual_seed(1)
    seen = torch.tensor([[True] * 5, [True, True, True, False, False]]) if mask else None
    tokens = torch.randn(2, 5, 8, generator=draws)
    return Context(tokens=tokens, mask=seen, vector=torch.randn(2, 8, generator=draws))


Z_T, TIMESTEP = torch.randn(2, 8, 1, 1, generator=torch.Generator().manual_seed(2)), torch.tensor([3.0, 700.0])


@pytest.mark.parametrize("mask", [False, True])
def test_a_model_folder_opens_in_diffusers_with_the_same_output(prior, tmp_path, mask):
    from diffusers import PriorTransformer as Theirs

    save_unet(prior, tmp_path)
    reference, context = Theirs.from_pretrained(tmp_path / "prior").eval(), condition(mask)
    seen = (
        torch.ones(2, 5, dtype=torch.bool) if context.mask is None else context.mask
    )  # without one, diffusers' is not causal
    with torch.no_grad():
        expected = reference(Z_T.flatten(1), TIMESTEP, context.vector, context.tokens, seen).predicted_image_embedding
        torch.testing.assert_close(prior(Z_T, TIMESTEP, context).flatten(1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reference.post_process_latents(expected), expected)  # a scale of its own it has not


def test_a_prior_of_diffusers_opens_here(tmp_path):
    from diffusers import PriorTransformer as Theirs

    torch.manual_seed(0)
    Theirs(2, 6, 2, embedding_dim=8, num_embeddings=5).save_pretrained(tmp_path / "prior")
    stipple_result = load_unet(tmp_path)
    assert stipple_result.config == CONFIG
    again = PriorTransformer(CONFIG)
    again.load_state_dict(stipple_result.state_dict(), strict=True)


def test_gradients_and_checkpointing_agree(prior):
    z_t = Z_T.clone().requires_grad_()
    plain = torch.autograd.grad(prior(z_t, TIMESTEP, condition()).square().sum(), z_t)[0]
    prior.checkpointing = True
    again = torch.autograd.grad(prior(z_t, TIMESTEP, condition()).square().sum(), z_t)[0]
    prior.checkpointing = False
    torch.testing.assert_close(again, plain)


def test_a_sampler_calls_it_as_it_calls_a_unet(prior):
    with torch.no_grad():
        torch.testing.assert_close(CachedUNet(prior)(Z_T, TIMESTEP, condition()), prior(Z_T, TIMESTEP, condition()))


def test_hidden_tokens_change_nothing_and_seen_ones_do(prior):
    context = condition(mask=True)
    with torch.no_grad():
        before = prior(Z_T, TIMESTEP, context)
        context.tokens[1, 3:] += 1
        assert torch.equal(prior(Z_T, TIMESTEP, context), before)
        context.tokens[1, 0] += 1
        assert not torch.allclose(prior(Z_T, TIMESTEP, context)[1], before[1])


def test_options_go_to_diffusers_and_back():
    wide = PriorConfig(embedding_dim=8, token_dim=12, vector_dim=10, text_tokens=5, layers=2, heads=2, head_dim=6)
    assert prior_from_diffusers(prior_to_diffusers(wide)) == wide
    with pytest.raises(ValueError, match="norm_in_type 'layer' is not implemented"):
        prior_from_diffusers({"norm_in_type": "layer"})


def test_a_context_of_another_conditioner_is_refused(prior):
    with pytest.raises(ValueError, match="use the conditioner that it was trained with"):
        prior(Z_T, TIMESTEP, Context(tokens=torch.zeros(2, 6, 8), vector=torch.zeros(2, 8)))


def test_the_default_is_the_papers_billion():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PriorTransformer(PriorConfig()).parameters())
    assert 1.0e9 < count < 1.3e9  # 24 blocks of 12 x 2048^2 are 1.21e9


class Embedder(torch.nn.Module):
    """What says of itself that it makes embeddings [B, 8] of pictures of 32 x 32 pixels."""

    dim, config = 8, SimpleNamespace(network={"size": 32})


@pytest.mark.parametrize(
    ("prior", "changes", "message"),
    [
        ({"text_tokens": 6}, {}, "prior.text_tokens 6 does not fit .* use 5"),
        ({"token_dim": 9}, {}, "prior.token_dim 9 does not fit .* use 8"),
        ({"embedding_dim": 9}, {}, "prior.embedding_dim 9 does not fit .* use 8"),
        ({}, {"samples": SamplesConfig()}, "samples.every 1000 draws images, and this model makes embeddings"),
        ({}, {"data": DataConfig(folder="", image_size=64)}, "data.image_size 64 .* use 32"),
        ({}, {"data": DataConfig(folder="", image_size=32, maps="maps")}, "data.maps maps has no effect"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused_with_its_config_keys(prior, changes, message):
    autoencoder = ImageEmbeddings(Embedder(), torch.zeros(8), torch.ones(8))
    condition = {"context_dim": 8, "vector_dim": 8, "latent_channels": 0, "max_length": 5}
    conditioner = SimpleNamespace(**condition, hint=None, reads=frozenset(), has_positions=False)
    provided = {"data": DataConfig(folder="", image_size=32), "samples": SamplesConfig(every=0)}

    def run(**options) -> LdmRunConfig:
        return LdmRunConfig(autoencoder="", **provided | options)

    check_shapes(run(prior=CONFIG), autoencoder, conditioner)
    with pytest.raises(ValueError, match=message):
        check_shapes(run(prior=replace(CONFIG, **prior), **changes), autoencoder, conditioner)
    with pytest.raises(ValueError, match="makes no image embeddings, which a prior requires"):
        check_shapes(run(prior=CONFIG, data=DataConfig(folder="")), Pixels(), conditioner)
