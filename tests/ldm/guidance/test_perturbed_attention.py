"""Perturbed attention guidance, against its paper and against diffusers."""

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from diffusers.pipelines.pag.pag_utils import PAGMixin

from conditioning.interface.context import Context
from ldm.denoising.denoiser import Denoiser
from ldm.denoising.perturbed_context import PerturbedContext
from ldm.guidance.classifier_free import classifier_free, rescaled
from ldm.guidance.combines import apg
from ldm.guidance.perturbed_attention import perturbed_attention
from ldm.networks.cached_unet import CachedUNet
from ldm.networks.identity_attention import self_attentions
from ldm.networks.unet import UNet
from tests.helpers.models.diffusers_unets import diffusers_unet
from tests.helpers.models.small_unets import PLAIN, SMALL, context, random_unet
from tests.helpers.proofs.oracles import SCHEDULES

T = 0.6
FIRST = replace(SMALL, attention_levels=(False, False))  # the first self-attention is the one in the middle
ALL = ("down_blocks", "mid_block", "up_blocks")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def z_t():
    return torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Watched(CachedUNet):
    """A `CachedUNet` that records the batches of latents and contexts."""

    def __init__(self, unet: UNet):
        super().__init__(unet)
        self.batches = []

    def __call__(self, z_t, timestep, condition):
        self.batches.append(len(z_t))
        return super().__call__(z_t, timestep, condition)


def contexts(width=SMALL.cross_attention_dim, images=2):
    torch.manual_seed(5)
    return tuple(Context(tokens=context(images, width=width).tokens.double()) for _ in range(2))


def denoiser_of(unet, prediction="velocity"):
    return Denoiser(Watched(unet), SCHEDULES["scaled_linear"], prediction)


def blinded(unet, blocks):
    """A copy of a UNet whose self-attentions in some blocks are the identity, by hand."""
    copy = deepcopy(unet)

    def alone(attention):
        def forward(x, signal=None):
            if signal is None:
                return attention.to_out[0](attention.to_v(x))
            h = attention.group_norm(x).flatten(2).transpose(1, 2)
            return x + attention.to_out[0](attention.to_v(h)).transpose(1, 2).view_as(x)

        return forward

    for attention in self_attentions(copy, blocks):
        attention.forward = alone(attention)
    return copy


@pytest.mark.parametrize(
    "config, blocks",
    [
        (SMALL, ("mid_block",)),
        (SMALL, ("up_blocks.1", "mid_block")),
        (SMALL, ALL),
        (replace(SMALL, transformer_layers=2), ("down_blocks.0.attentions.0.transformer_blocks.1",)),
        (FIRST, ("mid_block",)),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.0, 4.0])
def test_guided_is_the_formula_of_the_paper_with_self_attention_replaced_by_hand(z_t, config, blocks, scale):
    """Ahn et al. 2024, eq. 15 and 16; the perturbed estimate by a network of its own, pass by pass."""
    unet = random_unet(config).double()
    condition, null = contexts()
    blind = blinded(unet, blocks)
    guided = perturbed_attention(denoiser_of(unet), condition, null, scale, 2.5, blocks)(z_t, T)
    c, u, p = (denoiser_of(net)(z_t, T, of) for net, of in ((unet, condition), (unet, null), (blind, condition)))
    torch.testing.assert_close(guided, u + scale * (c - u) + 2.5 * (c - p))
    assert (c - p).abs().max() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_guided_is_what_diffusers_makes(z_t, scale):
    """Its processors of the middle block, and the formula of StableDiffusionPAGPipeline, on noise predictions."""
    unet, schedule = random_unet(SMALL).double(), SCHEDULES["scaled_linear"]
    reference, (condition, null) = diffusers_unet(unet).double().eval(), contexts()
    free = scale != 1
    processor = PAGCFGIdentitySelfAttnProcessor2_0() if free else PAGIdentitySelfAttnProcessor2_0()
    reference.mid_block.attentions[0].transformer_blocks[0].attn1.processor = processor
    parts = [null, condition, condition] if free else [condition, condition]
    timestep = schedule.timestep(T).expand(len(parts) * 2)
    output = reference(torch.cat([z_t] * len(parts)), timestep, torch.cat([part.tokens for part in parts])).sample
    mixin = SimpleNamespace(_get_pag_scale=lambda t: 3.0)
    noise = PAGMixin._apply_perturbed_attention_guidance(mixin, output, free, scale, 600)
    guided = perturbed_attention(denoiser_of(unet, "noise"), condition, null, scale, 3.0)(z_t, T)
    expected = Denoiser(lambda *_: noise, schedule, "noise")(z_t, T)
    torch.testing.assert_close(guided, expected)
    unperturbed = classifier_free(denoiser_of(unet, "noise"), condition, null, scale)(z_t, T)
    assert (expected - unperturbed).abs().max() > 1e-3


@pytest.mark.parametrize("scale, count", [(1.0, 2), (4.0, 3), (0.0, 3)])
def test_all_estimates_come_from_one_call(z_t, scale, count):
    condition, null = contexts()
    denoiser = denoiser_of(random_unet(SMALL).double())
    guided = perturbed_attention(denoiser, condition, null if scale != 1 else None, scale)
    for _ in range(2):
        guided(z_t, T)
    assert denoiser.network.batches == [2 * count] * 2


def test_one_prompt_serves_a_batch(z_t):
    condition, null = contexts(images=1)
    denoiser = denoiser_of(random_unet(SMALL).double())
    one = perturbed_attention(denoiser, condition, null, 3.0)(z_t, T)
    many = perturbed_attention(denoiser, condition.repeat(2), null.repeat(2), 3.0)(z_t, T)
    assert torch.equal(one, many)


@pytest.mark.parametrize("config", [replace(SMALL, cross_attention_dim=None), PLAIN], ids=["transformers", "plain"])
@pytest.mark.parametrize("blocks", [("mid_block",), ALL])
def test_an_unconditional_model_is_guided_by_perturbed_attention_alone(z_t, config, blocks):
    unet = random_unet(config).double()
    denoiser = denoiser_of(unet)
    guided = perturbed_attention(denoiser, None, None, 1.0, 2.0, blocks)(z_t, T)
    assert denoiser.network.batches == [4]
    plain, blind = denoiser(z_t, T), denoiser_of(blinded(unet, blocks))(z_t, T)
    torch.testing.assert_close(guided, plain + 2 * (plain - blind))
    assert (plain - blind).abs().max() > 1e-4


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_at_perturbed_scale_0_it_is_classifier_free_guidance_to_the_last_bit(z_t, scale):
    condition, null = contexts()
    denoiser = denoiser_of(random_unet(SMALL).double())
    guided = perturbed_attention(denoiser, condition, null, scale, 0.0)
    assert torch.equal(guided(z_t, T), classifier_free(denoiser, condition, null, scale)(z_t, T))


@pytest.mark.parametrize("config", [SMALL, FIRST])
def test_pictures_that_are_not_perturbed_are_as_they_would_be_alone(z_t, config):
    unet = random_unet(config).double()
    condition, null = contexts()
    whole = PerturbedContext(condition.cat(null).cat(condition), 2, ("mid_block",))
    reader, timestep = CachedUNet(unet), torch.full((6,), 300.0)
    output = reader(torch.cat([z_t] * 3), timestep, whole)
    torch.testing.assert_close(output[:2], unet(z_t, timestep[:2], condition))
    torch.testing.assert_close(output[2:4], unet(z_t, timestep[:2], null))
    assert not torch.allclose(output[4:], output[:2], atol=1e-5)
    torch.testing.assert_close(
        reader(z_t, timestep[:2], condition), unet(z_t, timestep[:2], condition)
    )  # nothing stays


def test_the_estimates_are_the_same_where_latents_are_not_alike(z_t):
    """On a CPU a reader computes alike latents once, up to the first cross-attention."""
    unet, (condition, null) = random_unet(FIRST).double(), contexts()
    whole = PerturbedContext(condition.cat(null).cat(condition), 2, ("mid_block",))
    many = torch.cat([z_t, z_t, z_t])
    many[0] += 1
    alike, other = (CachedUNet(unet)(z, torch.full((6,), 300.0), whole) for z in (torch.cat([z_t] * 3), many))
    torch.testing.assert_close(alike[1:], other[1:])


def test_any_way_to_combine_serves(z_t):
    """Rescaled as diffusers does, to the contrast of the conditional output, after both guidances."""
    unet, (condition, null) = random_unet(SMALL).double(), contexts()
    denoiser = denoiser_of(unet, "clean")
    combine = rescaled(1.0, denoiser.coefficients)
    guided = perturbed_attention(denoiser, condition, null, 6.0, 3.0, combine=combine)(z_t, T)
    plain = perturbed_attention(denoiser, condition, null, 6.0, 3.0)(z_t, T)
    expected_value = denoiser(z_t, T, condition).std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(guided, plain / plain.std((1, 2, 3), keepdim=True) * expected_value)
    added = perturbed_attention(denoiser, condition, null, 6.0, 3.0, combine=apg())(z_t, T) - denoiser(
        z_t, T, condition
    )
    assert (added * denoiser(z_t, T, condition)).flatten(1).sum(1).abs().max() < 1e-9


def test_unsupported_arguments_are_refused(z_t):
    condition, null = contexts()
    denoiser = denoiser_of(random_unet(SMALL).double())
    with pytest.raises(ValueError, match="perturbed scale nan must be a finite number"):
        perturbed_attention(denoiser, condition, null, 3.0, math.nan)
    with pytest.raises(ValueError, match="guidance scale -2.0 and perturbed scale 3.0 add up to 1"):
        perturbed_attention(denoiser, condition, null, -2.0)
    with pytest.raises(ValueError, match="no self-attention in 'mid' of this UNet; use down_blocks.0.*mid_block"):
        perturbed_attention(denoiser, condition, null, 3.0, blocks=("mid",))(z_t, T)
