"""Claims about learned words: one or several tokens, added to a text encoder that reads all else as before."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conditioning import ConditionerConfig, build_conditioner
from conditioning.classes.class_conditioner import Unconditional
from conditioning.text.new_tokens import FILE, initial_rows, new_token, read_embedding, save_embedding
from tests.helpers.models.single_files import clip
from tests.helpers.models.small_encoders import save_bert

PROMPTS = ["a red heart", "a toy cat", ""]


@pytest.fixture(params=["clip", "bert"])
def conditioner(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "bert":
        return build_conditioner(ConditionerConfig(name=str(save_bert(tmp_path))))
    built = clip("quick_gelu").requires_grad_(False)
    for value in built.encoder.parameters():
        value.copy_(torch.randn(value.shape) * 0.1)
    return built


def width(conditioner) -> int:
    return conditioner.context_dim


def test_prompts_without_a_new_word_are_read_as_before_bit_for_bit(conditioner):
    before = conditioner.encode(PROMPTS).tokens
    new_token(conditioner, "<toy>", torch.randn(1, width(conditioner)))
    new_token(conditioner, "<pet>", torch.randn(3, width(conditioner)))
    assert torch.equal(conditioner.encode(PROMPTS).tokens, before)


def test_a_word_that_begins_as_another_is_read_as_that(conditioner):
    for word in ("heart", "cat", "a", "red", "photo", "of"):
        if len(conditioner.tokenizer.ids(word)) == 1:
            break
    rows = initial_rows(conditioner, word, 1)
    new_token(conditioner, "<toy>", rows)
    a, b = conditioner.encode([f"a {word} of", "a <toy> of"]).tokens
    assert torch.equal(a, b)


def test_a_word_of_several_tokens_is_written_out_as_diffusers_does_it(conditioner):
    table = new_token(conditioner, "<toy>", torch.randn(3, width(conditioner)))
    first = table.first
    assert [i for i in conditioner.tokenizer.ids("a <toy> of") if i >= first] == [first, first + 1, first + 2]
    ids = torch.tensor([[first + 2, first, 1]])
    assert torch.equal(table(ids)[0, :2], table.rows[[2, 0]]) and torch.equal(table(ids)[0, 2], table.weight[1])


def test_only_the_rows_have_a_gradient(conditioner):
    table = new_token(conditioner, "<toy>", torch.randn(2, width(conditioner)))
    conditioner.trainable = True
    conditioner.train()
    assert not conditioner.training  # of a part of it that is frozen nothing may drop out
    conditioner.encode(["a <toy> of"]).tokens.square().mean().backward()
    assert [name for name, p in conditioner.named_parameters() if p.grad is not None] == [
        name for name, p in conditioner.named_parameters() if p is table.rows
    ]
    assert (table.rows.grad != 0).all()


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_gives_back_word_and_rows(count, tmp_path):
    rows = torch.randn(count, 8)
    save_embedding("<toy>", rows, tmp_path)
    for path in (tmp_path, tmp_path / FILE):
        token, read = read_embedding(path)
        assert token == "<toy>" and torch.equal(read, rows)
    assert load_file(tmp_path / FILE)["<toy>"].shape == ((8,) if count == 1 else (3, 8))


def test_what_is_no_word_or_does_not_fit_is_refused_in_one_line(conditioner, tmp_path):
    rows = torch.randn(1, width(conditioner))
    known = next(word for word in ("heart", "a") if len(conditioner.tokenizer.ids(word)) == 1)
    known = known if conditioner.tokenizer.backend.token_to_id(known) is not None else f"{known}</w>"
    for act, condition in [
        (lambda: new_token(conditioner, known, rows), "is in the vocabulary"),
        (lambda: new_token(conditioner, "two words", rows), "must be one word"),
        (lambda: new_token(conditioner, "<toy>", rows[:, 1:]), "of width"),
        (lambda: initial_rows(conditioner, "a a a", 2), "3 tokens"),
        (lambda: initial_rows(conditioner, " ", 2), "0 tokens"),
        (lambda: new_token(Unconditional(), "<toy>", rows), "exactly one text encoder"),
    ]:
        with pytest.raises(ValueError, match=condition):
            act()
    save_file({"a": rows, "b": rows.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="not the embedding of one word"):
        read_embedding(tmp_path / "two.safetensors")


def test_diffusers_and_transformers_read_a_word_as_we_do(tmp_path):
    import diffusers
    from transformers import AutoTokenizer, CLIPTextModel

    stipple = clip("quick_gelu").requires_grad_(False)
    torch.manual_seed(1)
    for value in stipple.encoder.parameters():
        value.copy_(torch.randn(value.shape) * 0.1)
    stipple.save(tmp_path)
    reference = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    save_embedding("<toy>", torch.randn(2, width(stipple)), tmp_path)
    new_token(stipple, *read_embedding(tmp_path))

    class Pipeline(diffusers.loaders.TextualInversionLoaderMixin):
        hf_device_map, components = None, {}

    loader = Pipeline()
    loader.load_textual_inversion(str(tmp_path), tokenizer=tokenizer, text_encoder=reference)
    prompt = loader.maybe_convert_prompt("a photo of a <toy> in red", tokenizer)
    ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids).last_hidden_state
    assert torch.equal(ids, stipple.tokenize(["a photo of a <toy> in red"]).ids)
    assert torch.allclose(stipple.encode(["a photo of a <toy> in red"]).tokens, expected, atol=1e-4)
