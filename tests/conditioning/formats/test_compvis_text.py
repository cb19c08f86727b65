"""Tests of text encoders of single files: tokens of open_clip and transformers, and conversion of every key."""

import math

import pytest
import torch

from conditioning import (
    ConditionerConfig,
    build_conditioner,
    conditioner_from_compvis,
    load_conditioner,
)
from conditioning.encoders.clip import empty_clip
from conditioning.formats.compvis_conditioner import conditioner_to_compvis
from conditioning.formats.compvis_text import kind_of_text, text_config, text_from_compvis, text_to_compvis
from stipple_core.files.weights import misfits
from tests.helpers.models.small_encoders import build_scratch, save_bert

PROMPTS = ["a Red heart's 123", "", "naïve 🙂 wow!", "long " * 90]
POSITION_IDS = "transformer.text_model.embeddings.position_ids"


def tower(layers: int = 3):
    """Return a small open_clip text tower with heads of width 64, as in Stable Diffusion 2."""
    from open_clip.model import _build_text_tower

    torch.manual_seed(0)
    built = _build_text_tower(48, {"width": 128, "heads": 2, "layers": layers})
    for name, parameter in built.named_parameters():  # values as in a trained model, including biases
        torch.nn.init.normal_(parameter, 1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.1)
    return built.eval()


def as_sd2(built) -> dict[str, torch.Tensor]:
    """Return the weights of Stable Diffusion 2's file without the prefix cond_stage_model."""
    named = {f"model.{name}": weight for name, weight in built.state_dict().items()}
    return {**named, "model.logit_scale": torch.tensor(4.6)}


def clip_model():
    """Return a small CLIPTextModel with heads of width 64, as in Stable Diffusion 1."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
    return CLIPTextModel(CLIPTextConfig(**sizes)).eval()


def as_sd1(model) -> dict[str, torch.Tensor]:
    """Return the weights of Stable Diffusion 1's file without the prefix cond_stage_model."""
    named = {name.removeprefix("text_model."): weight for name, weight in model.state_dict().items()}
    named["embeddings.position_ids"] = torch.arange(77)[None]
    return {f"transformer.text_model.{name}": weight for name, weight in named.items()}


def test_tokens_of_stable_diffusion_2_equal_open_clips_penultimate_layer_after_the_final_norm(tmp_path):
    import open_clip
    from transformers import CLIPTextModel

    built = tower()
    conditioner = conditioner_from_compvis(as_sd2(built))
    ids = open_clip.tokenize(PROMPTS)
    assert torch.equal(conditioner.tokenize(PROMPTS).ids, ids)
    with torch.no_grad():
        hidden = built.forward_intermediates(ids, output_fmt="NLC")["text_intermediates"][-2]
        expected = built.ln_final(hidden)
    tokens = conditioner.encode(PROMPTS).tokens
    assert (tokens - expected).abs().max() < 1e-6 * expected.abs().max()
    conditioner.save(tmp_path)
    reference = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    with torch.no_grad():
        out = reference(ids, output_hidden_states=True)
    assert (out.last_hidden_state - expected).abs().max() < 1e-6 * expected.abs().max()
    assert (out.hidden_states[-1] - hidden).abs().max() < 1e-6 * hidden.abs().max()
    assert torch.equal(load_conditioner(tmp_path).encode(PROMPTS).tokens, tokens)


def test_a_rewritten_stable_diffusion_2_file_has_all_keys_and_a_last_block_that_is_the_identity():
    built = tower()
    weights = as_sd2(built)
    back = conditioner_to_compvis(conditioner_from_compvis(weights))
    assert {*back} == {*weights} and kind_of_text(back) == "open_clip"
    changed = [name for name in weights if not torch.equal(back[name], weights[name])]
    assert all("resblocks.2." in name or name in ("model.text_projection", "model.logit_scale") for name in changed)
    assert math.isclose(back["model.logit_scale"], math.log(100), rel_tol=1e-6)
    again = tower()
    again.text_projection = None
    written = {name.removeprefix("model."): weight for name, weight in back.items()}
    again.load_state_dict({name: w for name, w in written.items() if name in again.state_dict()}, strict=True)
    ids = torch.randint(0, 49408, (2, 77))
    with torch.no_grad():
        last, penultimate = (
            model.forward_intermediates(ids, output_fmt="NLC")["text_intermediates"][layer]
            for model, layer in ((again, -1), (built, -2))
        )
    assert torch.equal(last, penultimate)
    once_more = conditioner_to_compvis(conditioner_from_compvis(back))
    assert all(torch.equal(once_more[name], back[name]) for name in back), "further conversions change nothing"


def test_every_key_of_stable_diffusion_2_is_converted():
    import open_clip

    config = open_clip.get_model_config("ViT-H-14")
    from open_clip.model import _build_text_tower

    with torch.device("meta"):
        built = _build_text_tower(config["embed_dim"], config["text_cfg"])
    weights = {f"model.{name}": weight for name, weight in built.state_dict().items()}
    weights |= {"model.logit_scale": torch.empty((), device="meta"), "model.attn_mask": torch.empty(77, 77)}
    converted, settings = text_from_compvis(weights), text_config(weights)
    assert not misfits(empty_clip(settings).state_dict(), converted)
    expected = dict(num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu", hidden_size=1024)
    expected |= dict(intermediate_size=4096, projection_dim=1024, model_type="clip_text_model")
    assert expected.items() <= settings.items()
    back = text_to_compvis(converted, "open_clip")
    assert {name: w.shape for name, w in back.items()} == {
        name: w.shape for name, w in weights.items() if name != "model.attn_mask"
    }


@pytest.mark.parametrize("short", (False, True))
def test_tokens_of_stable_diffusion_1_equal_those_of_transformers_and_its_file_is_written_back_equal(short, tmp_path):
    from transformers import CLIPTextModel

    model = clip_model()
    weights = as_sd1(model)
    named = {name.replace("text_model.", ""): w for name, w in weights.items()} if short else weights
    conditioner = conditioner_from_compvis(named)
    ids = conditioner.tokenize(PROMPTS).ids
    assert (ids[1, 2:] == 49407).all()  # padded with the end token
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    torch.testing.assert_close(conditioner.encode(PROMPTS).tokens, expected, rtol=0, atol=1e-6 * expected.abs().max())
    back = conditioner_to_compvis(conditioner)
    assert {*back} == {*weights} and all(torch.equal(back[name], weights[name]) for name in weights)
    conditioner.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(CLIPTextModel.from_pretrained(tmp_path / "text_encoder")(ids).last_hidden_state, expected)


def test_every_key_of_stable_diffusion_1_is_converted():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
    with torch.device("meta"):
        weights = as_sd1(CLIPTextModel(CLIPTextConfig(**sizes)))
    settings = text_config(weights)
    assert {**sizes, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}.items() <= settings.items()
    converted = text_from_compvis(weights)
    assert not misfits(empty_clip(settings).state_dict(), converted) and len(converted) == 196
    back = text_to_compvis(converted, "clip")
    assert {*back} == {*weights} and back[POSITION_IDS].tolist() == [list(range(77))]


def test_half_precision_in_a_file_is_float32_in_memory_by_default():
    weights = {name: weight.half() for name, weight in as_sd2(tower()).items()}
    assert {p.dtype for p in conditioner_from_compvis(weights).parameters()} == {torch.float32}
    half = conditioner_from_compvis(weights, dtype=torch.float16)
    assert {weight.dtype for weight in conditioner_to_compvis(half).values()} == {torch.float16}


def test_keys_of_stable_diffusion_1_that_do_not_fit_raise_in_one_line():
    weights = as_sd1(clip_model())
    table, bias = (f"transformer.text_model.{name}" for name in ("embeddings.token_embedding.weight", "fc1.bias"))
    bias = bias.replace("fc1", "encoder.layers.0.mlp.fc1")
    for broken, message in (
        ({name: w for name, w in weights.items() if name != bias}, "encoder.layers.0.mlp.fc1.bias is missing"),
        ({**weights, table: torch.ones(5)}, r"token_embedding.weight is \[5\], not a table"),
        ({**weights, table: torch.ones(5, 100)}, "width 100 is not a multiple of 64"),
        ({**weights, "transformer.text_model.extra": torch.ones(1)}, "text_model.extra is not known"),
        ({"embedding.weight": torch.ones(3)}, r"embedding.weight is \[3\], not a table"),
        ({"embedding.weight": torch.ones(3, 2), "other": torch.ones(1)}, "other is not known"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            conditioner_from_compvis(broken)
        assert "\n" not in str(caught.value)


MISTAKES = {
    "unknown kind": (lambda w: {"encoder.x": torch.ones(1)}, "keys of an unknown kind: encoder.x"),
    "left over": (lambda w: {**w, "model.extra": torch.ones(1)}, "extra is not known"),
    "other prefix": (lambda w: {**w, "head": torch.ones(1)}, "head is not known"),
    "missing": (
        lambda w: {k: v for k, v in w.items() if "ln_final" not in k},
        "ln_final.weight is missing; ln_final.b",
    ),
    "misshapen": (
        lambda w: {**w, "model.ln_final.bias": torch.ones(3)},
        "text_model.final_layer_norm.bias is [3], not [128]",
    ),
    "many": (lambda w: {k: v for k, v in w.items() if ".ln_" not in k}, "; and 5 more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_keys_that_do_not_fit_raise_in_one_line(mistake):
    change, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as caught:
        conditioner_from_compvis(change(as_sd2(tower())))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_vocabulary_other_than_clips_requires_a_tokenizer(tmp_path):
    scratch = build_scratch()
    weights = {name: w for name, w in as_sd1(clip_model()).items()}
    weights["transformer.text_model.embeddings.token_embedding.weight"] = torch.ones(600, 128)
    with pytest.raises(ValueError, match="600 tokens, CLIP's vocabulary 49408; pass a tokenizer"):
        conditioner_from_compvis(weights)
    scratch.save(tmp_path)
    assert conditioner_from_compvis(weights, tmp_path / "tokenizer").max_length == 77


def test_an_encoder_that_no_single_file_can_hold_raises(tmp_path):
    bert = build_conditioner(ConditionerConfig(name=str(save_bert(tmp_path))))
    with pytest.raises(ValueError, match="a single file can't hold a text encoder of type bert with a mask"):
        conditioner_to_compvis(bert)
    with pytest.raises(ValueError, match="a single file can't hold heads of width 16; their width must be 64"):
        conditioner_to_compvis(build_scratch())
