"""Tests of LDM's text transformer: tokens of CompVis and diffusers, and folders of diffusers."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conditioning import (
    ConditionerConfig,
    build_conditioner,
    conditioner_from_compvis,
    load_conditioner,
)
from conditioning.encoders.ldm_bert import LdmBert, empty_ldm_bert, ldm_bert_config
from conditioning.formats.compvis_text import text_config, text_from_compvis, text_to_compvis
from stipple_core.files.weights import misfits
from tests.helpers.models.small_encoders import CAPTIONS, ldm_bert_shapes, save_bert


def diffusers():
    """Where its class is; not imported before it is needed, for every process of the suite collects this file."""
    return pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")


def compvis_bert() -> dict[str, torch.Tensor]:
    """Return random weights of a small text transformer."""
    draw = torch.Generator().manual_seed(0)
    sizes = ldm_bert_shapes(layers=2, width=40, vocab_size=60, length=24)
    return {name: torch.randn(shape, generator=draw) / shape[-1] ** 0.5 for name, shape in sizes.items()}


def x_transformer(weights: dict[str, torch.Tensor], ids: torch.Tensor, layers: int) -> torch.Tensor:
    """Compute CompVis' transformer in float64: pre-norm, eight heads, softmax of q k / 8, GELU."""
    w = {name.removeprefix("transformer."): weight.double() for name, weight in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["token_emb.weight"][ids] + w["pos_emb.emb.weight"][: ids.shape[1]]
    for n in range(0, 2 * layers, 2):
        attention, forward = f"attn_layers.layers.{n}", f"attn_layers.layers.{n + 1}"
        h = norm(x, f"{attention}.0")
        q, k, v = ((h @ w[f"{attention}.1.to_{p}.weight"].T).unflatten(-1, (8, 64)).transpose(1, 2) for p in "qkv")
        h = ((q @ k.transpose(2, 3) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + h @ w[f"{attention}.1.to_out.weight"].T + w[f"{attention}.1.to_out.bias"]
        h = norm(x, f"{forward}.0") @ w[f"{forward}.1.net.0.0.weight"].T + w[f"{forward}.1.net.0.0.bias"]
        x = x + F.gelu(h) @ w[f"{forward}.1.net.2.weight"].T + w[f"{forward}.1.net.2.bias"]
    return norm(x, "norm")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Return a folder with a tokenizer of BERT that has fewer than 60 pieces."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def diffusers_bert():
    torch.manual_seed(0)
    sizes = dict(d_model=40, encoder_layers=3, encoder_ffn_dim=96, encoder_attention_heads=2, head_dim=16)
    config = diffusers().LDMBertConfig(vocab_size=60, max_position_embeddings=24, **sizes)
    model = diffusers().LDMBertModel(config).eval()
    for parameter in model.parameters():  # including norms and biases
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def folder(diffusers_bert, tokenizer, tmp_path) -> Path:
    """Return a folder with bert/ and tokenizer/, as of diffusers' LDMTextToImagePipeline."""
    diffusers_bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "tokenizer").mkdir()
    for file in tokenizer.glob("tokenizer*"):
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_tokens_equal_those_of_compvis(tokenizer):
    weights = compvis_bert()
    conditioner = conditioner_from_compvis(weights, tokenizer)
    ids = conditioner.tokenize([*CAPTIONS, ""]).ids
    expected = x_transformer(weights, ids, 2)
    tokens = conditioner.encode([*CAPTIONS, ""]).tokens
    assert (tokens - expected).abs().max() < 1e-6 * expected.abs().max()
    assert conditioner.encode(["a"]).mask is None, "LDM attends to padding"


@pytest.mark.parametrize("use_mask", (False, True))
def test_tokens_equal_those_of_diffusers_with_and_without_a_mask(diffusers_bert, folder, use_mask):
    conditioner = build_conditioner(ConditionerConfig(name=str(folder), use_mask=use_mask or None))
    assert isinstance(conditioner.encoder, LdmBert) and conditioner.context_dim == 40
    tokens = conditioner.tokenize(["a red heart", "", CAPTIONS[-1]])
    with torch.no_grad():
        expected = diffusers_bert(tokens.ids, attention_mask=tokens.mask.long() if use_mask else None)[0]
    assert (conditioner(tokens.ids, tokens.mask).tokens - expected).abs().max() < 1e-6 * expected.abs().max()


def test_folders_of_diffusers_open_and_saved_folders_open_in_diffusers(diffusers_bert, folder):
    conditioner = load_conditioner(folder)
    conditioner.save(folder / "saved")
    config = json.loads((folder / "saved/text_encoder/config.json").read_text())
    assert config["model_type"] == "ldmbert" and config["use_attention_mask"] is False
    reopened = diffusers().LDMBertModel.from_pretrained(folder / "saved/text_encoder").eval()
    assert all(torch.equal(w, reopened.state_dict()[name]) for name, w in diffusers_bert.state_dict().items())
    again = load_conditioner(folder / "saved")
    assert torch.equal(again.encode(CAPTIONS).tokens, conditioner.encode(CAPTIONS).tokens)
    assert again.components["text_encoder"] == ["latent_diffusion", "LDMBertModel"]


def test_the_penultimate_layer_is_a_shorter_model(diffusers_bert, folder):
    conditioner = build_conditioner(ConditionerConfig(name=str(folder), layer="penultimate"))
    diffusers_bert.model.layers = diffusers_bert.model.layers[:-1]
    tokens = conditioner.tokenize(["a red heart"])
    with torch.no_grad():
        torch.testing.assert_close(conditioner(tokens.ids, tokens.mask).tokens, diffusers_bert(tokens.ids)[0])
    assert conditioner.encoder.config["encoder_layers"] == 2


def test_the_text_to_image_model_has_the_names_and_sizes_of_diffusers_at_full_size():
    bert = empty_ldm_bert(ldm_bert_config({"model_type": "ldmbert"}))
    with torch.device("meta"):
        diffusers_bert = diffusers().LDMBertModel(diffusers().LDMBertConfig())
    assert not misfits(diffusers_bert.state_dict(), bert.state_dict())
    assert sum(weight.numel() for weight in bert.state_dict().values()) == 581_994_042


@pytest.mark.parametrize(
    ("layers", "width", "vocab_size", "length", "count"),
    ((32, 1280, 30522, 77, 581_994_042), (16, 512, 8192, 92, 58_858_496)),
    ids=("text", "layout"),
)
def test_every_key_of_a_compvis_file_is_converted_and_converted_back(layers, width, vocab_size, length, count):
    sizes = ldm_bert_shapes(layers, width, vocab_size, length)
    weights = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    converted = text_from_compvis(weights)
    assert not misfits(empty_ldm_bert(text_config(weights)).state_dict(), converted)
    back = text_to_compvis(converted, "bert")
    assert {*back} == {*weights} and all(back[name] is weight for name, weight in weights.items())
    assert sum(w.numel() for w in converted.values()) == count


def test_an_unsupported_option_raises(folder):
    path = folder / "bert/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "activation_function": "relu"}))
    with pytest.raises(ValueError, match="activation_function 'relu' of ldmbert is not supported; it must be 'gelu'"):
        load_conditioner(folder)
