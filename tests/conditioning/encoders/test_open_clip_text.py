"""Tests of text encoders of open_clip: tokens, and storage as a CLIPTextModel or as a module of open_clip."""

import json
from pathlib import Path

import pytest
import torch

from conditioning import ConditionerConfig, build_conditioner, load_conditioner
from tests.helpers.models.small_encoders import save_bert, save_open_clip


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("open_clip_folder"))


@pytest.mark.parametrize("layer", ("last", "penultimate"))
@pytest.mark.parametrize("final_norm", (True, False))
def test_tokens_of_open_clip_equal_those_of_its_text_tower(open_clip_folder, layer, final_norm, tmp_path):
    import open_clip

    name = f"local-dir:{open_clip_folder}"
    model = open_clip.create_model(name).eval()
    prompts = ["a Red &amp; blue  heart's 123", "", "naÃ¯ve 🙂", "long " * 40]
    ids = open_clip.get_tokenizer(name)(prompts)
    conditioner = build_conditioner(ConditionerConfig(kind="open_clip", name=name, layer=layer, final_norm=final_norm))
    tokens = conditioner.tokenize(prompts)
    assert torch.equal(tokens.ids, ids) and tokens.mask.sum(1)[1] == 2
    index = -1 if layer == "last" else -2
    with torch.no_grad():
        hidden = model.forward_intermediates(text=ids, text_indices=None)["text_intermediates"][index]
        expected = model.ln_final(hidden) if final_norm else hidden
    torch.testing.assert_close(conditioner(tokens.ids, tokens.mask).tokens, expected, rtol=0, atol=1e-6)
    conditioner.save(tmp_path)
    assert torch.equal(load_conditioner(tmp_path).encode(prompts).tokens, conditioner.encode(prompts).tokens)
    config = json.loads((tmp_path / "text_encoder/config.json").read_text())
    assert config["model_type"] == ("clip_text_model" if final_norm else "open_clip")
    if final_norm:
        from transformers import CLIPTextModel

        opened = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
        with torch.no_grad():
            torch.testing.assert_close(opened(ids).last_hidden_state, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ({"embed_cls": True}, {"ls_init_value": 0.1}, {"no_causal_mask": True}))
def test_an_open_clip_tower_that_is_not_a_plain_clip_remains_a_module_of_open_clip(text, tmp_path, monkeypatch):
    import open_clip
    from open_clip.factory import _MODEL_CONFIGS

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    sizes = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**sizes, **text}, "custom_text": True}
    monkeypatch.setitem(_MODEL_CONFIGS, "tiny-other", config)
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny-other"])
    conditioner = build_conditioner(ConditionerConfig(kind="open_clip", name="tiny-other", pretrained="random"))
    assert conditioner.encoder.config["model_type"] == "open_clip"
    conditioner.save(tmp_path)
    tokens = conditioner.encode(["a red heart"]).tokens
    assert torch.equal(load_conditioner(tmp_path).encode(["a red heart"]).tokens, tokens)


def test_an_open_clip_model_with_a_hugging_face_tower_keeps_its_config(bert, tmp_path, monkeypatch):
    text = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "context_length": 24, "hf_proj_type": "linear"}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    import open_clip
    from open_clip.factory import _MODEL_CONFIGS

    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(_MODEL_CONFIGS, "tiny-hf", config)
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny-hf"])
    conditioner = build_conditioner(ConditionerConfig(kind="open_clip", name="tiny-hf", pretrained="random"))
    assert conditioner.use_mask
    conditioner.save(tmp_path)
    assert str(bert) not in (tmp_path / "tokenizer/tokenizer_config.json").read_text()
    loaded = load_conditioner(tmp_path)
    assert torch.equal(loaded.encode(["a red heart"]).tokens, conditioner.encode(["a red heart"]).tokens)
