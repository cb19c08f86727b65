"""Tests of the text transformer trained from scratch, and of its tokenizer, which is trained on captions."""

import json
from pathlib import Path

import pytest
import torch

from conditioning import ConditionerConfig, TextConditioner, build_conditioner
from conditioning.encoders.scratch import train_tokenizer
from tests.helpers.models.small_encoders import CAPTIONS, SCRATCH, build_scratch


@pytest.fixture(scope="module")
def scratch() -> TextConditioner:
    return build_scratch()


def test_a_transformer_from_scratch_gets_gradients_in_every_parameter(scratch):
    scratch.train()
    tokens = scratch.tokenize(["a red heart", "a blue circle"])
    scratch(tokens.ids, tokens.mask).tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scratch.parameters())
    scratch.zero_grad(set_to_none=True)


def test_the_tokenizer_ignores_the_order_of_captions_and_the_weights_ignore_the_global_seed(scratch):
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    config = ConditionerConfig(kind="scratch", scratch=SCRATCH)
    assert build_conditioner(config, CAPTIONS[::-1], seed=3).fingerprint() == scratch.fingerprint()
    assert torch.equal(before, torch.get_rng_state())
    assert build_conditioner(config, CAPTIONS, seed=4).fingerprint() != scratch.fingerprint()


def test_the_tokenizer_is_deterministic_although_many_pairs_are_equally_frequent():
    """Otherwise a resumed run, or a second process, would use other ids for words."""
    lines = (Path(__file__).parents[3] / "tests" / "pictures" / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["text"] for line in lines]
    assert len({train_tokenizer(captions, 600, 16).fingerprint() for _ in range(20)}) == 1


def test_a_tokenizer_restored_from_a_checkpoint_returns_the_same_ids(scratch):
    other = train_tokenizer([f"a purple {shape} over there" for shape in ("square", "squirrel", "squid")] * 2, 600, 16)
    assert not torch.equal(other(CAPTIONS).ids, scratch.tokenize(CAPTIONS).ids)
    other.load_state_dict(scratch.tokenizer.state_dict())
    assert torch.equal(other(CAPTIONS).ids, scratch.tokenize(CAPTIONS).ids)
    assert other.fingerprint() == scratch.tokenizer.fingerprint()


def test_a_transformer_from_scratch_opens_in_transformers_with_equal_ids_and_tokens(scratch, tmp_path):
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

    scratch.save(tmp_path)
    prompts = ["🙂👩‍👩‍👧 emoji", "数の絵", "", " \n\t ", "[SEP] <|endoftext|>", *CAPTIONS] + ["x " * 99]
    tokens = scratch.tokenize(prompts)
    for opened in (AutoTokenizer, CLIPTokenizer):
        tokenizer = opened.from_pretrained(tmp_path / "tokenizer")
        encoded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        assert torch.equal(encoded.input_ids, tokens.ids) and torch.equal(encoded.attention_mask.bool(), tokens.mask)
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    with torch.no_grad():
        expected = model(tokens.ids).last_hidden_state
        assert torch.equal(expected, scratch.eval()(tokens.ids, tokens.mask).tokens)
    assert tokenizer.decode(tokens.ids[-5], skip_special_tokens=True) == CAPTIONS[-4].lower().replace(",", " ,")
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["use_attention_mask"] is False


def test_no_text_is_unknown_to_a_trained_tokenizer(scratch):
    end = scratch.tokenizer.backend.token_to_id("<|endoftext|>")
    ids = scratch.tokenize(["数", "🙂", "Ж", "\x07"]).ids
    assert all((row != end).sum() >= 2 for row in ids)
