"""Claims about layouts as prompts: their tokens are those of LDM's layout model, and survive the disk."""

import pytest
import torch
from small_encoders import ldm_bert_shapes

from conditioning import Conditioner, conditioner_from_compvis
from conditioning.layouts import LayoutConfig, LayoutTokenizer

EMPTY, WHOLE = 8191, [0, 89 * 90 + 89]  # the grid of 8192 tokens has 90 x 90 cells


def test_an_object_is_its_class_and_two_corners_and_the_crop_comes_last():
    tokenizer = LayoutTokenizer(8192, 11)
    tokens = tokenizer(["17 0.1 0.2 0.5 0.9; 3 0 0 1 1", ""])
    cells = [round(0.2 * 89) * 90 + round(0.1 * 89), round(0.9 * 89) * 90 + round(0.5 * 89)]
    assert tokens.ids.tolist() == [[17, *cells, 3, *WHOLE, *[EMPTY] * 3, *WHOLE], [EMPTY] * 9 + WHOLE]
    assert tokens.mask.all()


def test_objects_that_do_not_fit_are_named():
    tokenizer = LayoutTokenizer(8192, 5)
    assert tokenizer.cut("1 0 0 1 1; 2 0 0 1 1;3 0 0 .5 1") == "2 0 0 1 1; 3 0 0 .5 1"
    assert tokenizer.cut("1 0 0 1 1;") == "" == tokenizer.cut("")
    assert torch.equal(tokenizer(["1 0 0 1 1; 2 0 0 1 1"]).ids, tokenizer(["1 0 0 1 1"]).ids)


@pytest.mark.parametrize(
    "prompt", ("a cat", "1 0 0 1", "1 0 0 1 1 1", "8191 0 0 1 1", "-1 0 0 1 1", "1 0 0 2 1", "1 1 0 0 1")
)
def test_what_is_no_object_is_one_line(prompt):
    with pytest.raises(ValueError, match='is no object of a layout: .*"CLASS LEFT TOP RIGHT BOTTOM"') as caught:
        LayoutTokenizer(8192, 92)([prompt])
    assert "\n" not in str(caught.value)


def test_a_layout_model_opens_without_a_tokenizer_and_survives_the_disk(tmp_path):
    sizes = ldm_bert_shapes(layers=1, width=16, vocab_size=8192, length=92)
    conditioner = conditioner_from_compvis({name: torch.randn(shape) for name, shape in sizes.items()})
    tokens = conditioner.encode(["17 0.1 0.2 0.5 0.9", ""]).tokens
    assert tokens.shape == (2, 92, 16) and conditioner.max_length == 92
    conditioner.save(tmp_path)
    loaded = Conditioner.load(tmp_path)
    assert torch.equal(loaded.encode(["17 0.1 0.2 0.5 0.9", ""]).tokens, tokens)
    assert loaded.fingerprint() == Conditioner.load(tmp_path).fingerprint()


def test_no_cell_is_the_token_of_no_object():
    tokenizer = LayoutTokenizer(LayoutConfig(vocab_size=26).vocab_size, 5)
    last = tokenizer(["0 1 1 1 1"]).ids[0, 1].item()
    assert last == 24 and tokenizer([""]).ids[0, 0] == 25
    with pytest.raises(ValueError, match="layout.vocab_size 25 leaves, .* no token for no object; use 26"):
        LayoutConfig(vocab_size=25)
