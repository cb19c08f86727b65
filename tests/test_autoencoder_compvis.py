"""Claims about CompVis' first stages: known from keys and shapes, placed without remainder, written back the same."""

import hashlib

import pytest
import torch
from compvis_shapes import FIRST_STAGES, first_stage, lines

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.compvis import GROUPS, compvis_config, from_compvis, to_compvis
from autoencoder.compvis import first_stage as only_networks
from storage.weights import misfits, place

SMALL = dict(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=GROUPS)
DIGESTS = {  # of names and shapes in the state dicts of CompVis' own classes
    "kl-f8": "5c5821b036193b0effb3adf049e2c1c81c13c11351273652c09fab3be5aa1501",
    "vq-f8": "4b597c70452aa991850fc57564af802d739916d4e7b12dcb5c14670567ba4b53",
}


def digest(shapes):
    return hashlib.sha256("\n".join(lines(shapes)).encode()).hexdigest()


def empty(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def small(seed=0, **options):
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AutoencoderConfig(**(SMALL | options)))
    for parameter in autoencoder.parameters():  # biases and norms too
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return autoencoder


def compvis_small():
    autoencoder = small()
    return to_compvis(autoencoder.state_dict(), autoencoder.config)


def images(dtype=torch.float32):
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("name", DIGESTS)
def test_the_names_and_shapes_tested_here_are_those_of_the_original_classes(name):
    assert digest(first_stage(**FIRST_STAGES[name][0])) == DIGESTS[name]


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_the_papers_first_stages_are_known_from_their_keys_and_placed_without_remainder(name):
    options, count = FIRST_STAGES[name]
    theirs = empty(first_stage(**options))
    config = compvis_config(theirs)
    with torch.device("meta"):
        ours = Autoencoder(config).state_dict()
    assert misfits(ours, from_compvis(theirs)) == []
    assert sum(value.numel() for value in ours.values()) == count
    back = to_compvis(from_compvis(theirs), config)
    assert {key: tuple(value.shape) for key, value in back.items()} == first_stage(**options)


OPTIONS = [
    dict(),
    dict(attention_levels=(False, True, True)),
    dict(regularizer="vq", codebook_size=48),
    dict(regularizer="vq", codebook_size=48, codebook_dim=2, mid_attention=False),
    dict(block_out_channels=(32,), layers_per_block=2, latent_channels=6, in_channels=1),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_ours_to_compvis_and_back_is_the_identity_and_tells_its_architecture(options):
    autoencoder = small(**options)
    weights = autoencoder.state_dict()
    theirs = to_compvis(weights, autoencoder.config)
    assert not any("_blocks" in name or "resnets" in name for name in theirs)
    assert all(value.ndim == 4 for name, value in theirs.items() if name.endswith("attn_1.q.weight"))
    assert compvis_config(theirs) == autoencoder.config
    again = small(seed=1, **options)
    place(again, from_compvis(theirs), "the round trip")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


def test_losses_and_discriminators_are_left_out():
    weights = compvis_small()
    others = dict.fromkeys(["loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay", "colorize"])
    assert only_networks(weights | others).keys() == weights.keys()
    whole = {f"first_stage_model.{name}": value for name, value in weights.items()} | {"betas": None}
    assert only_networks(whole).keys() == weights.keys()


def test_averages_over_training_are_preferred_where_all_are_there():
    weights = compvis_small()
    averages = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in weights.items()}
    assert all(torch.equal(value, weights[name] + 1) for name, value in only_networks(weights | averages).items())
    averages.popitem()
    assert all(value is weights[name] for name, value in only_networks(weights | averages).items())


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_another_scale_of_the_networks_latents_changes_neither_latents_nor_pictures(regularizer):
    autoencoder, x = small(regularizer=regularizer, codebook_size=48).double(), images(torch.float64)
    autoencoder.scaling_factor, autoencoder.shift_factor = 2.5, 0.3
    posterior, pictures = autoencoder.encode(x), autoencoder.decode(autoencoder.encode(x).mode())
    autoencoder.rescale(0.18215)
    assert (autoencoder.scaling_factor, autoencoder.shift_factor) == (0.18215, 0.0)
    again = autoencoder.encode(x)
    assert torch.allclose(again.mean, posterior.mean, atol=1e-10)
    assert torch.allclose(again.logvar, posterior.logvar, atol=1e-10)
    assert torch.allclose(autoencoder.decode(again.mode()), pictures, atol=1e-5)  # codes are looked up in float32
    raw = autoencoder.posterior(x)  # what a program without our scale sees
    assert torch.allclose(raw.mean * 0.18215, posterior.mean, atol=1e-10)


def test_the_scale_it_has_already_changes_no_bit():
    autoencoder = small()
    autoencoder.scaling_factor = 0.18215
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    autoencoder.rescale(0.18215)
    assert all(torch.equal(value, before[name]) for name, value in autoencoder.state_dict().items())


BROKEN = [
    (lambda w: {}, "no encoder.down.0 in the weights"),
    (lambda w: {k: v for k, v in w.items() if k != "decoder.conv_in.weight"}, "decoder.conv_in.weight is missing"),
    (lambda w: w | {"encoder.conv_in.weight": torch.zeros(3)}, r"encoder.conv_in.weight is \[3\]"),
    (lambda w: w | {"quantize.embed.weight": torch.zeros(3, 3)}, "no quantize.embedding.weight"),
    (lambda w: w | {"quantize.embedding.weight": torch.zeros(3)}, r"quantize.embedding.weight is \[3\]"),
    (lambda w: w | {"encoder.down.900000000.x": torch.zeros(3)}, "encoder.down.3.block.0.conv1.weight is missing"),
]


@pytest.mark.parametrize("change, message", BROKEN)
def test_weights_of_something_else_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        compvis_config(change(compvis_small()))
