"""Tests of all text encoders: storage, unusual text, independence of the batch, and error messages."""

from pathlib import Path

import pytest
import torch

from conditioning import ConditionerConfig, TextConditioner, TransformerConfig, build_conditioner, load_conditioner
from tests.helpers.models.small_encoders import CAPTIONS, build_scratch, save_bert, save_open_clip, save_t5

ODD = [
    "\0nul\0",
    "lone \ud800 surrogate",
    "pair \ud83d\ude42",
    "🙂👩‍👩‍👧 emoji",
    "数の絵",
    "",
    " \n\t ",
    "[SEP] <|endoftext|>",
]
KINDS = ("bert", "t5", "open_clip", "scratch")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("open_clip_folder"))


@pytest.fixture(scope="module")
def scratch() -> TextConditioner:
    return build_scratch()


def build(kind: str, request: pytest.FixtureRequest, **options) -> TextConditioner:
    if kind == "scratch":
        return request.getfixturevalue("scratch")
    if kind == "open_clip":
        name = f"local-dir:{request.getfixturevalue('open_clip_folder')}"
        return build_conditioner(ConditionerConfig(kind="open_clip", name=name, **options))
    return build_conditioner(ConditionerConfig(name=str(request.getfixturevalue(kind)), **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_conditioner_loads_back_equal(kind, request, tmp_path):
    conditioner = build(kind, request)
    conditioner.save(tmp_path)
    loaded = load_conditioner(tmp_path)
    prompts = ["a small red heart", *ODD]
    with torch.no_grad():
        before, after = (c(*vars(c.tokenize(prompts)).values()) for c in (conditioner, loaded))
    assert torch.equal(before.tokens, after.tokens)
    assert (before.mask is None) == (after.mask is None) and loaded.max_length == conditioner.max_length
    assert loaded.fingerprint() == load_conditioner(tmp_path).fingerprint()
    loaded.save(tmp_path / "again")
    for file in ("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_on_disk_is_float32_in_memory_by_default(kind, request, tmp_path):
    conditioner = build(kind, request)
    conditioner.save(tmp_path, dtype=torch.float16)
    loaded = load_conditioner(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    dtypes = {p.dtype for p in load_conditioner(tmp_path, dtype=torch.float16).parameters()}
    assert dtypes == ({torch.float16, torch.float32} if kind == "t5" else {torch.float16})  # T5's `wo` would overflow
    difference = loaded.encode(["a red heart"]).tokens - conditioner.encode(["a red heart"]).tokens
    assert difference.abs().max() < 0.02
    assert loaded.fingerprint() != conditioner.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_text_is_encoded_with_the_same_shape(kind, request):
    conditioner = build(kind, request)
    context = conditioner.encode(ODD)
    assert context.tokens.shape == (len(ODD), conditioner.max_length, conditioner.context_dim)
    assert context.tokens.isfinite().all()
    assert torch.equal(context.tokens[5], context.tokens[6])  # "" and white space
    assert torch.equal(conditioner.null(2).tokens, context.tokens[5:6].repeat(2, 1, 1))
    assert conditioner.encode(["x" * 10**6]).tokens.isfinite().all()
    assert conditioner.encode(["a red heart " * 10**5]).tokens.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_returns_the_words_that_do_not_fit(kind, request):
    conditioner = build(kind, request)
    words = ["heart"] * 200
    cut = conditioner.cut(" ".join(words))
    assert cut and set(cut.split()) == {"heart"}
    fitting = len(words) - len(cut.split())
    assert conditioner.cut(" ".join(words[:fitting])) == ""
    short, long = conditioner.tokenize([" ".join(words[:fitting]), " ".join(words)]).ids
    assert torch.equal(short, long) or kind in ("t5", "scratch")  # these may include a piece of the next word
    assert len(conditioner.cut("red heart " * 10**5)) > 900_000
    assert conditioner.cut("") == "" and conditioner.cut("a red heart") == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_of_a_prompt_does_not_depend_on_its_batch(kind, request):
    conditioner = build(kind, request)
    prompts = ["a red heart", "a small dark blue circle, circle again", "", "a red heart"]
    with torch.no_grad():
        batched = conditioner.encode(prompts)
        for i, prompt in enumerate(prompts):
            assert torch.equal(batched.tokens[i : i + 1], conditioner.encode([prompt]).tokens)
    tokens = conditioner.tokenize(prompts)
    one_pass = conditioner(tokens.ids, tokens.mask).tokens
    torch.testing.assert_close(one_pass, batched.tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ("bert", "t5", "open_clip"))
def test_pretrained_encoders_are_frozen(kind, request):
    conditioner = build(kind, request)
    conditioner.train()
    assert not any(module.training for module in conditioner.modules())
    assert not any(p.requires_grad for p in conditioner.parameters())
    assert not conditioner.encode(["a red heart"]).tokens.requires_grad


def test_the_fingerprint_changes_with_weights_tokenizer_and_options(bert):
    def fingerprint(**options):
        return build_conditioner(ConditionerConfig(name=str(bert), **options)).fingerprint()

    changed = [fingerprint(), fingerprint(max_length=9), fingerprint(use_mask=False), fingerprint(layer="penultimate")]
    assert len(set(changed)) == 4 and fingerprint() == changed[0]


MISTAKES = {
    "unknown kind": (dict(kind="clip", name="x"), "kind 'clip' is unknown; use one of"),
    "no name": (dict(), "requires `name`"),
    "unknown layer": (dict(layer="first"), "layer 'first' is unknown; use one of last, penultimate"),
    "no folder": (dict(name="./nowhere/at/all"), "./nowhere/at/all does not exist"),
    "no network": (dict(name="openai/clip-vit-large-patch14"), "hf download openai/clip-vit-large-patch14"),
    "no captions": (dict(kind="scratch"), "requires captions"),
    "small vocabulary": (dict(kind="scratch", scratch=TransformerConfig(vocab_size=99)), "must be at least 514"),
    "heads": (dict(kind="scratch", scratch=TransformerConfig(width=30, heads=4)), "not divisible by 4 heads"),
    "unknown architecture": (dict(kind="open_clip", name="ViT-Z-9"), "no architecture 'ViT-Z-9'; similar ones: "),
    "no tag": (dict(kind="open_clip", name="RN50"), "requires `pretrained`: a file, random, or one of"),
    "weights of open_clip": (
        dict(kind="open_clip", name="RN50", pretrained="cc12m"),
        "set `pretrained` to a",
    ),
    "norm": (dict(name="x", final_norm=False), "open_clip only"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_in_one_line_that_names_the_fix(mistake, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options, message = MISTAKES[mistake]
    captions = None if mistake == "no captions" else CAPTIONS
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        build_conditioner(ConditionerConfig(**options), captions)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_broken_folder_raises_in_one_line_that_names_it(bert, tmp_path):
    def attempt(message: str, error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            build_conditioner(ConditionerConfig(name=str(tmp_path)))
        assert message in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    attempt("no config.json", FileNotFoundError)
    (tmp_path / "config.json").write_text("{")
    attempt("not readable JSON", ValueError)
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    attempt("no tokenizer", FileNotFoundError)
    (tmp_path / "tokenizer.json").write_text("{}")
    attempt("readable tokenizer", ValueError)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    attempt("no model.safetensors in", FileNotFoundError)
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:5000])
    attempt("is not a readable safetensors file", ValueError)


def test_invalid_lengths_and_prompts_raise(bert):
    with pytest.raises(ValueError, match="max_length 25 exceeds the text encoder's 24 positions; use at most 24"):
        build_conditioner(ConditionerConfig(name=str(bert), max_length=25))
    with pytest.raises(ValueError, match="requires at least 3"):
        build_conditioner(ConditionerConfig(name=str(bert), max_length=2))
    with pytest.raises(ValueError, match="must be text, not int"):
        build_conditioner(ConditionerConfig(name=str(bert))).encode([7])
    with pytest.raises(ValueError, match="prompts is empty"):
        build_conditioner(ConditionerConfig(name=str(bert))).encode([])
