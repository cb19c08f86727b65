"""Tests of the tokenizers of CLIP and BERT, which equal those of open_clip and transformers."""

import json
from pathlib import Path

import pytest
import torch

from conditioning import bert_tokenizer, clip_tokenizer
from conditioning.tokenizers.tokenizer import read_tokenizer
from tests.helpers.models.small_encoders import CAPTIONS, save_bert

PROMPTS = [
    *CAPTIONS,
    "a Red  heart's 123",
    "",
    "naïve 🙂👩‍👩‍👧 wow! hello!!",
    "long " * 90,
    "数の絵 don't",
    "<|endoftext|> x",
]


def padded(tokenizer, prompts: list[str]):
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")


def test_ids_of_clip_equal_those_of_open_clip():
    import open_clip

    plain = [prompt for prompt in PROMPTS if "<|" not in prompt]  # open_clip has other start and end tokens
    assert torch.equal(clip_tokenizer(pad="!")(plain).ids, open_clip.tokenize(plain))


def test_ids_of_clip_equal_those_of_transformers_with_the_same_vocabulary(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = clip_tokenizer()
    tokenizer.save(tmp_path)
    expected = padded(CLIPTokenizer.from_pretrained(tmp_path), PROMPTS)
    tokens = tokenizer(PROMPTS)
    assert torch.equal(tokens.ids, expected.input_ids) and torch.equal(tokens.mask, expected.attention_mask.bool())
    converted = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert torch.equal(padded(converted, PROMPTS).input_ids, tokens.ids)
    assert torch.equal(read_tokenizer(tmp_path)(PROMPTS).ids, tokens.ids)


@pytest.mark.parametrize("pad", ("<|endoftext|>", "!"))
def test_vocabulary_and_merges_alone_are_read_as_in_transformers(pad, tmp_path):
    from transformers import AutoTokenizer

    clip_tokenizer(pad=pad).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()  # as in the folders of Stable Diffusion
    expected = padded(AutoTokenizer.from_pretrained(tmp_path), PROMPTS)
    tokens = read_tokenizer(tmp_path)(PROMPTS)
    assert torch.equal(tokens.ids, expected.input_ids) and torch.equal(tokens.mask, expected.attention_mask.bool())


def test_a_broken_vocabulary_raises_in_one_line(tmp_path):
    clip_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ValueError, match="has no readable tokenizer") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def test_berts_vocabulary_file_is_read_as_in_transformers(bert, tmp_path):
    from transformers import BertTokenizer

    pieces = json.loads((bert / "tokenizer.json").read_text())["model"]["vocab"]
    named = {index: piece for piece, index in pieces.items()}
    lines = [named.get(index, f"[unused{index}]") for index in range(max(named) + 1)]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    tokens = bert_tokenizer(tmp_path)(PROMPTS)
    expected = padded(BertTokenizer.from_pretrained(bert), PROMPTS)
    assert torch.equal(tokens.ids, expected.input_ids) and torch.equal(tokens.mask, expected.attention_mask.bool())
    assert torch.equal(bert_tokenizer(bert)(PROMPTS).ids, tokens.ids)
    bert_tokenizer(tmp_path).save(tmp_path / "saved")
    assert torch.equal(padded(BertTokenizer.from_pretrained(tmp_path / "saved"), PROMPTS).input_ids, tokens.ids)


def test_a_missing_bert_tokenizer_raises_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="bert-base-uncased.*then use FOLDER as the tokenizer") as caught:
        bert_tokenizer()
    assert "\n" not in str(caught.value)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(ValueError, match=r"is not BERT's vocabulary: it has no \[CLS\], \[SEP\], \[MASK\]"):
        bert_tokenizer(tmp_path)
