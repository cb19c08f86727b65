"""Claims about LDM's text transformer: it computes what CompVis and diffusers do, and opens the latter's folders."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_encoders import CAPTIONS, ldm_bert_shapes, save_bert

from conditioning import Conditioner, ConditionerConfig, build_conditioner, conditioner_from_compvis, load_conditioner
from conditioning.compvis import text_config, text_from_compvis, text_to_compvis
from conditioning.ldm_bert import LdmBert, empty_ldm_bert, ldm_bert_config
from storage.weights import misfits


def diffusers():
    """Where its class is; not imported before it is needed, for every process of the suite collects this file."""
    return pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")


def compvis_bert() -> dict[str, torch.Tensor]:
    """Random weights of a small one."""
    draw = torch.Generator().manual_seed(0)
    sizes = ldm_bert_shapes(layers=2, width=40, vocab_size=60, length=24)
    return {name: torch.randn(shape, generator=draw) / shape[-1] ** 0.5 for name, shape in sizes.items()}


def x_transformer(weights: dict[str, torch.Tensor], ids: torch.Tensor, layers: int) -> torch.Tensor:
    """CompVis' arithmetic, written out: pre-norm, eight heads, softmax of q k / 8, GELU, all in float64."""
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
    """A folder with a BERT's tokenizer of fewer than 60 pieces."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    sizes = dict(d_model=40, encoder_layers=3, encoder_ffn_dim=96, encoder_attention_heads=2, head_dim=16)
    config = diffusers().LDMBertConfig(vocab_size=60, max_position_embeddings=24, **sizes)
    model = diffusers().LDMBertModel(config).eval()
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def folder(theirs, tokenizer, tmp_path) -> Path:
    """bert/ and tokenizer/, as in a folder of diffusers' LDMTextToImagePipeline."""
    theirs.save_pretrained(tmp_path / "bert")
    (tmp_path / "tokenizer").mkdir()
    for file in tokenizer.glob("tokenizer*"):
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_tokens_are_those_of_compvis(tokenizer):
    weights = compvis_bert()
    conditioner = conditioner_from_compvis(weights, tokenizer)
    ids = conditioner.tokenize([*CAPTIONS, ""]).ids
    expected = x_transformer(weights, ids, 2)
    tokens = conditioner.encode([*CAPTIONS, ""]).tokens
    assert (tokens - expected).abs().max() < 1e-6 * expected.abs().max()
    assert conditioner.encode(["a"]).mask is None, "LDM attends to padding"


@pytest.mark.parametrize("use_mask", (False, True))
def test_tokens_are_those_of_diffusers_with_and_without_a_mask(theirs, folder, use_mask):
    conditioner = build_conditioner(ConditionerConfig(name=str(folder), use_mask=use_mask or None))
    assert isinstance(conditioner.encoder, LdmBert) and conditioner.context_dim == 40
    tokens = conditioner.tokenize(["a red heart", "", CAPTIONS[-1]])
    with torch.no_grad():
        expected = theirs(tokens.ids, attention_mask=tokens.mask.long() if use_mask else None)[0]
    assert (conditioner(tokens.ids, tokens.mask).tokens - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_folder_of_diffusers_opens_and_what_we_save_opens_there(theirs, folder):
    conditioner = load_conditioner(folder)
    conditioner.save(folder / "ours")
    config = json.loads((folder / "ours/text_encoder/config.json").read_text())
    assert config["model_type"] == "ldmbert" and config["use_attention_mask"] is False
    reopened = diffusers().LDMBertModel.from_pretrained(folder / "ours/text_encoder").eval()
    assert all(torch.equal(w, reopened.state_dict()[name]) for name, w in theirs.state_dict().items())
    again = Conditioner.load(folder / "ours")
    assert torch.equal(again.encode(CAPTIONS).tokens, conditioner.encode(CAPTIONS).tokens)
    assert again.components["text_encoder"] == ["latent_diffusion", "LDMBertModel"]


def test_the_penultimate_layer_is_a_shorter_model(theirs, folder):
    conditioner = build_conditioner(ConditionerConfig(name=str(folder), layer="penultimate"))
    theirs.model.layers = theirs.model.layers[:-1]
    tokens = conditioner.tokenize(["a red heart"])
    with torch.no_grad():
        torch.testing.assert_close(conditioner(tokens.ids, tokens.mask).tokens, theirs(tokens.ids)[0])
    assert conditioner.encoder.config["encoder_layers"] == 2


def test_the_text_to_image_model_has_the_names_and_sizes_of_diffusers_at_full_size():
    ours = empty_ldm_bert(ldm_bert_config({"model_type": "ldmbert"}))
    with torch.device("meta"):
        theirs = diffusers().LDMBertModel(diffusers().LDMBertConfig())
    assert not misfits(theirs.state_dict(), ours.state_dict())
    assert sum(weight.numel() for weight in ours.state_dict().values()) == 581_994_042


@pytest.mark.parametrize(
    ("layers", "width", "vocab_size", "length", "count"),
    ((32, 1280, 30522, 77, 581_994_042), (16, 512, 8192, 92, 58_858_496)),
    ids=("text", "layout"),
)
def test_every_key_of_a_compvis_file_has_a_place_and_goes_back_to_it(layers, width, vocab_size, length, count):
    sizes = ldm_bert_shapes(layers, width, vocab_size, length)
    weights = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    ours = text_from_compvis(weights)
    assert not misfits(empty_ldm_bert(text_config(weights)).state_dict(), ours)
    back = text_to_compvis(ours, "bert")
    assert {*back} == {*weights} and all(back[name] is weight for name, weight in weights.items())
    assert sum(w.numel() for w in ours.values()) == count


def test_an_option_that_is_not_implemented_is_named(folder):
    path = folder / "bert/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "activation_function": "relu"}))
    with pytest.raises(ValueError, match="activation_function 'relu' of an ldmbert is not implemented; only 'gelu' is"):
        load_conditioner(folder)
