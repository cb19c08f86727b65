"""The latent UNet: what it computes does not depend on how it is run."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ldm.networks.cached_unet import CachedUNet
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from stipple_core.operators.sinusoids import sinusoids
from tests.helpers.models.published_unets import PUBLISHED
from tests.helpers.models.small_unets import PLAIN, SMALL, close, context, random_unet

KINDS = pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["transformers", "plain attention"])


def condition(config: UNetConfig) -> SimpleNamespace:
    return context(width=config.cross_attention_dim)


def count(config: UNetConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())


@pytest.mark.parametrize(("config", "millions"), PUBLISHED.values(), ids=PUBLISHED)
def test_parameter_counts_are_those_of_the_published_models(config, millions):
    exact = round(millions, 1) != millions
    assert count(config) == round(millions * 1e6) if exact else round(count(config) / 1e6, 1) == millions


@KINDS
def test_an_untrained_network_returns_zero_and_every_parameter_learns_in_a_few_steps(config):
    torch.manual_seed(0)
    unet = UNet(config)
    z_t, timestep, words = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), condition(config)
    assert unet(z_t, timestep, words).abs().max() == 0
    before = copy.deepcopy(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(4):  # each step wakes what lies behind the next zero layer
        (unet(z_t, timestep, words) - z_t).square().mean().backward()
        optimizer.step()
    still = [name for name, value in unet.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


def test_construction_follows_the_global_generator():
    def build(seed):
        torch.manual_seed(seed)
        return UNet(SMALL).state_dict()

    same, again, other = build(1), build(1), build(2)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["conv_in.weight"], other["conv_in.weight"])


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit_of_output_and_gradients(config, dropout):
    unet = random_unet(replace(config, dropout=dropout)).train()
    z_t, timestep, words = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.5]), condition(config)

    def run(checkpointing):
        unet.checkpointing = checkpointing
        unet.zero_grad()
        leaf = z_t.clone().requires_grad_()
        torch.manual_seed(5)
        output = unet(leaf, timestep, words)
        output.square().mean().backward()
        return [output, leaf.grad, *(parameter.grad.clone() for parameter in unet.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_checkpointing_keeps_fewer_activations():
    unet = random_unet(SMALL)

    def kept(checkpointing):
        unet.checkpointing, sizes = checkpointing, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            unet(torch.randn(2, 4, 8, 8), torch.zeros(2), context())
        return sum(sizes)

    assert kept(True) < 0.3 * kept(False)


@KINDS
def test_channels_last_gives_the_same_output_in_its_own_layout(config):
    unet, words = random_unet(config), condition(config)
    z_t, timestep = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    expected = unet(z_t, timestep, words)
    output = unet.to(memory_format=torch.channels_last)(z_t.to(memory_format=torch.channels_last), timestep, words)
    assert close(output, expected) and output.is_contiguous(memory_format=torch.channels_last)


@KINDS
def test_no_layer_copies_channels_last_features(config):
    unet = random_unet(config).to(memory_format=torch.channels_last)
    layouts = []
    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm) and module is not unet.conv_in:
            module.register_forward_pre_hook(
                lambda _, x: layouts.append(x[0].is_contiguous(memory_format=torch.channels_last))
            )
    unet(torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last), torch.zeros(2), condition(config))
    assert len(layouts) > 20 and all(layouts)


def test_each_image_of_a_batch_is_alone():
    unet, words = random_unet(SMALL), context(3)
    z_t, timestep = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 10.0, 999.0])
    words.mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    whole = unet(z_t, timestep, words)
    alone = context(1, tokens=5)
    alone.tokens, alone.mask = words.tokens[1:2], words.mask[1:2]
    assert close(unet(z_t[1:2], timestep[1:2], alone), whole[1:2])


@torch.no_grad()
def test_a_context_that_was_read_before_gives_the_same_bits():
    unet, z_t, timestep = random_unet(SMALL), torch.randn(2, SMALL.in_channels, 8, 8), torch.tensor([3.0, 700.0])
    condition = context()
    read = unet.read(condition)
    to_k = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    to_k.weight.fill_(torch.nan)  # not used again
    assert torch.equal(unet(z_t, timestep, read), random_unet(SMALL)(z_t, timestep, condition))


@torch.no_grad()
@pytest.mark.parametrize("levels", [(True, True), (False, True), (False, False)], ids=str)
def test_repeated_latents_pass_the_layers_before_the_context_once_with_the_same_output(levels, monkeypatch):
    config = replace(SMALL, attention_levels=levels, vector_dim=None)
    unet, z_t, timestep, prompts = (
        random_unet(config),
        torch.randn(2, config.in_channels, 8, 6),
        torch.rand(2),
        context(4),
    )
    twice = torch.cat([z_t, z_t]), torch.cat([timestep, timestep]), prompts
    expected, cached, batches = unet(*twice), CachedUNet(unet), []
    convolve = unet.conv_in.forward
    monkeypatch.setattr(unet.conv_in, "forward", lambda x: batches.append(len(x)) or convolve(x))
    assert close(cached(*twice), expected, 1e-6) and batches == [2]
    cached(torch.cat([z_t, z_t + 1]), *twice[1:])
    assert batches == [2, 4]
    assert close(unet(*twice), expected, 1e-6) and batches == [2, 4, 4]  # no hook stays


def test_tokens_of_another_batch_are_refused():
    unet, z_t = random_unet(replace(SMALL, vector_dim=None)), torch.randn(3, SMALL.in_channels, 8, 6)
    with pytest.raises(ValueError, match="for 4 images do not go with 3 latents"):
        unet(z_t, torch.rand(3), context(4))


def test_masked_tokens_are_not_seen():
    unet, words = random_unet(SMALL), context()
    z_t, timestep = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    words.mask = torch.arange(5).expand(2, 5) < 3
    masked = unet(z_t, timestep, words)
    short = context()
    short.tokens = words.tokens[:, :3]
    words.tokens[:, 3:] = 100.0
    assert close(masked, unet(z_t, timestep, short))
    assert torch.equal(masked, unet(z_t, timestep, words))


def test_a_wholly_masked_context_is_finite():
    words = context()
    words.mask = torch.zeros(2, 5, dtype=torch.bool)
    assert random_unet(SMALL)(torch.randn(2, 4, 8, 8), torch.zeros(2), words).isfinite().all()


def test_the_whole_network_compiles_into_one_graph():
    unet, words = random_unet(SMALL), context()
    words.mask = torch.arange(5).expand(2, 5) < 3
    z_t, timestep = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert close(compiled(z_t, timestep, words), unet(z_t, timestep, words))


@KINDS
@pytest.mark.parametrize("size", [(7, 9), (5, 8), (8, 12), (1, 1)])
def test_any_size_comes_back_at_its_size(config, size):
    assert random_unet(config)(torch.randn(2, 4, *size), torch.zeros(2), condition(config)).shape == (2, 4, *size)


def test_heads_are_counted_only_where_there_is_attention():
    config = replace(SMALL, attention_levels=(False, False), attention_heads=(5, 4))  # 5 does not divide 32
    assert config.attention_heads == (1, 4)  # the middle has attention
    assert config == replace(SMALL, attention_levels=(False, False), attention_heads=(1, 4))


def test_the_time_embedding_is_continuous_and_tells_near_timesteps_apart():
    near = sinusoids(torch.tensor([500.0, 500.25, 501.0]), 64)
    assert 0 < (near[1] - near[0]).norm() < (near[2] - near[0]).norm()
    assert torch.equal(sinusoids(torch.zeros(1), 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))  # cosines come first


def test_latents_and_vector_of_the_context_reach_the_output():
    unet = random_unet(replace(SMALL, in_channels=7, vector_dim=6))
    condition = context(vector=torch.randn(2, 6), latents=torch.randn(2, 3, 8, 8))
    z_t, timestep = torch.randn(2, 4, 8, 8), torch.zeros(2)
    condition.vector.requires_grad_()
    condition.latents.requires_grad_()
    condition.tokens.requires_grad_()
    unet(z_t, timestep, condition).square().sum().backward()
    assert all(
        part.grad.abs().amin(dim=tuple(range(1, part.ndim))).isfinite().all()
        for part in (condition.vector, condition.latents, condition.tokens)
    )
    assert (
        condition.vector.grad.abs().sum() > 0
        and condition.latents.grad.abs().sum() > 0
        and condition.tokens.grad.abs().sum() > 0
    )


@pytest.mark.parametrize("config", [replace(SMALL, cross_attention_dim=None), PLAIN], ids=["transformers", "plain"])
def test_without_cross_attention_no_context_is_needed(config):
    unet = random_unet(config)
    assert unet(torch.randn(2, 4, 8, 8), torch.zeros(2)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, "context.tokens of width None does not fit this UNet, which was built for 12"),
        (context(width=16), "context.tokens of width 16"),
        (context(vector=torch.zeros(2, 3)), "context.vector of width 3"),
        (context(latents=torch.zeros(2, 1, 8, 8)), "context.latents 1"),
    ],
)
def test_a_context_that_does_not_fit_is_named(condition, message):
    with pytest.raises(ValueError, match=message):
        UNet(SMALL)(torch.zeros(2, 4, 8, 8), torch.zeros(2), condition)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_levels": (True,)}, "attention_levels .* one entry for each of the 2 levels"),
        ({"attention_heads": (1, 2, 3)}, "attention_heads .* one entry for each of the 2 levels"),
        ({"attention_heads": (5, 4)}, "attention_heads 5 does not divide the 32 channels of level 0"),
        ({"norm_num_groups": 24}, "block_out_channels 32 is not divisible by norm_num_groups 24"),
        ({"attention": "linear"}, "attention 'linear' is not known; use one of transformer, plain"),
        ({"resample": "fir"}, "resample 'fir' is not known; use one of conv, residual"),
        ({"attention": "plain"}, "cross_attention_dim 12 does not go with attention 'plain'"),
        ({"resample": "residual"}, "resample 'residual' does not go with attention 'transformer'"),
    ],
)
def test_an_impossible_shape_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(SMALL, **change)
    assert "\n" not in str(error.value)
