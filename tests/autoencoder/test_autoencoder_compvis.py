"""CompVis' first stages: inferred from keys and shapes, loaded completely, and converted back to equal weights."""

import hashlib

import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.formats.compvis_first_stage import (
    GROUPS,
    SCALE,
    compvis_config,
    first_stage_keys,
    from_compvis,
    read_scale,
    to_compvis,
)
from stipple_core.files.weights import misfits, place, write_weights
from tests.helpers.models.compvis_shapes import FIRST_STAGES, first_stage, lines

SMALL = dict(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=GROUPS)
DIGESTS = {  # of names and shapes in the state dicts of CompVis' classes
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
def test_names_and_shapes_are_those_of_the_original_classes(name):
    assert digest(first_stage(**FIRST_STAGES[name][0])) == DIGESTS[name]


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_the_first_stages_of_the_paper_are_inferred_and_converted_completely(name):
    options, count = FIRST_STAGES[name]
    compvis = empty(first_stage(**options))
    config = compvis_config(compvis)
    with torch.device("meta"):
        expected = Autoencoder(config).state_dict()
    assert misfits(expected, from_compvis(compvis)) == []
    assert sum(value.numel() for value in expected.values()) == count
    back = to_compvis(from_compvis(compvis), config)
    assert {key: tuple(value.shape) for key, value in back.items()} == first_stage(**options)


OPTIONS = [
    dict(),
    dict(attention_levels=(False, True, True)),
    dict(regularizer="vq", codebook_size=48),
    dict(regularizer="vq", codebook_size=48, codebook_dim=2, mid_attention=False),
    dict(block_out_channels=(32,), layers_per_block=2, latent_channels=6, in_channels=1),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_conversion_to_compvis_and_back_is_the_identity(options):
    autoencoder = small(**options)
    weights = autoencoder.state_dict()
    compvis = to_compvis(weights, autoencoder.config)
    assert not any("_blocks" in name or "resnets" in name for name in compvis)
    assert all(value.ndim == 4 for name, value in compvis.items() if name.endswith("attn_1.q.weight"))
    assert compvis_config(compvis) == autoencoder.config
    again = small(seed=1, **options)
    place(again, from_compvis(compvis), "the round trip")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


def test_losses_and_discriminators_are_ignored():
    weights = compvis_small()
    others = dict.fromkeys(["loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay", "colorize"])
    assert first_stage_keys(weights | others) == {name: name for name in weights}
    whole = {name: f"first_stage_model.{name}" for name in weights}
    assert first_stage_keys([*whole.values(), "betas", "first_stage_model.loss.logvar", "encoder.x"]) == whole


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_averages_over_training_are_used_if_they_are_complete(prefix):
    names = list(compvis_small())
    averages = {name: f"{prefix}model_ema.{name.replace('.', '')}" for name in names}
    keys = [f"{prefix}{name}" for name in names] + list(averages.values())
    assert first_stage_keys(keys) == averages
    with pytest.raises(ValueError, match="averaged weights are missing, the first model_ema."):
        first_stage_keys(keys[:-1])


def test_a_file_is_loaded_with_its_averages_and_scale(tmp_path):
    weights = compvis_small()
    averages = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in weights.items()}
    write_weights(weights | averages | {SCALE: torch.tensor(0.5)}, tmp_path / "x.safetensors")
    loaded = Autoencoder.load(tmp_path / "x.safetensors")
    assert loaded.scaling_factor == 0.5
    compvis = to_compvis(loaded.state_dict(), loaded.config)
    assert all(torch.equal(value, weights[name] + 1) for name, value in compvis.items())


def test_the_scale_is_one_positive_number_of_the_file_or_else_of_the_yaml():
    assert read_scale({}) is None and read_scale({}, 0.5) == 0.5
    assert read_scale({SCALE: torch.tensor([0.25])}, 0.5) == 0.25
    for value in (0.0, -1.0, torch.nan, torch.inf, [1.0, 2.0], [], 1j):
        with pytest.raises(ValueError, match="scale_factor is .*; the scale of latents is one positive number"):
            read_scale({SCALE: torch.tensor(value)})
    for value in (0, "a", torch.nan, [1.0]):
        with pytest.raises(ValueError, match="scale_factor is .*; the scale of latents is one positive number"):
            read_scale({}, value)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_rescale_changes_neither_unit_scale_latents_nor_images(regularizer):
    autoencoder, x = small(regularizer=regularizer, codebook_size=48).double(), images(torch.float64)
    autoencoder.scaling_factor, autoencoder.shift_factor = 2.5, 0.3
    posterior, decoded = autoencoder.encode(x), autoencoder.decode(autoencoder.encode(x).mode())
    autoencoder.rescale(0.18215)
    assert (autoencoder.scaling_factor, autoencoder.shift_factor) == (0.18215, 0.0)
    again = autoencoder.encode(x)
    assert torch.allclose(again.mean, posterior.mean, atol=1e-10)
    assert torch.allclose(again.logvar, posterior.logvar, atol=1e-10)
    assert torch.allclose(autoencoder.decode(again.mode()), decoded, atol=1e-5)  # codes are looked up in float32
    raw = autoencoder.posterior(x)  # the latents that other programs use
    assert torch.allclose(raw.mean * 0.18215, posterior.mean, atol=1e-10)


def test_rescale_to_the_current_scale_changes_nothing():
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
def test_the_error_for_other_weights_names_what_is_missing(change, message):
    with pytest.raises(ValueError, match=message):
        compvis_config(change(compvis_small()))
