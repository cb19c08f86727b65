"""Claims about layouts as prompts: their tokens are those of LDM's layout model, and survive the disk."""

import pytest
import torch

from conditioning import TextConditioner, conditioner_from_compvis, load_conditioner
from conditioning.build import ConditionerConfig, build_conditioner
from conditioning.layouts.layout_tokenizer import LayoutConfig, LayoutTokenizer
from tests.helpers.small_encoders import ldm_bert_shapes

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
    loaded = load_conditioner(tmp_path)
    assert torch.equal(loaded.encode(["17 0.1 0.2 0.5 0.9", ""]).tokens, tokens)
    assert loaded.fingerprint() == load_conditioner(tmp_path).fingerprint()


def test_no_cell_is_the_token_of_no_object():
    tokenizer = LayoutTokenizer(LayoutConfig(vocab_size=26).vocab_size, 5)
    last = tokenizer(["0 1 1 1 1"]).ids[0, 1].item()
    assert last == 24 and tokenizer([""]).ids[0, 0] == 25
    with pytest.raises(ValueError, match="layout.vocab_size 25 leaves, .* no token for no object; use 26"):
        LayoutConfig(vocab_size=25)


def waves(names: list[str], seed: int = 0) -> TextConditioner:
    """A conditioner of layouts that reads corners as sines, on a grid of 65 x 65 cells."""
    config = LayoutConfig(names=names, vocab_size=4226, max_objects=2, width=16, reader="waves")
    return build_conditioner(ConditionerConfig(kind="layout", layout=config), seed=seed).eval()


def test_waves_are_a_token_per_object_and_one_of_the_whole_picture_and_survive_the_disk(tmp_path):
    conditioner = waves(["cat", "dog"])
    conditioner.trainable = False  # no gradients: prompts one at a time
    prompts = ["cat 0 0 0.5 0.5; dog 0.5 0.5 1 1", "cat 0 0 0.5 0.5", ""]
    tokens = conditioner.encode(prompts).tokens
    assert tokens.shape == (3, 3, 16)
    for a, b in ((tokens[0, 0], tokens[1, 0]), (tokens[1, 1], tokens[2, 1]), (tokens[0, 2], tokens[2, 2])):
        assert torch.allclose(a, b, atol=1e-5)  # a token tells of its own object alone
    assert not torch.allclose(tokens[0, 0], conditioner.encode(["dog 0 0 0.5 0.5"]).tokens[0, 0], atol=0.1)
    conditioner.save(tmp_path)
    loaded = load_conditioner(tmp_path)
    assert torch.equal(loaded.encode(prompts).tokens, tokens)
    assert loaded.fingerprint() == conditioner.fingerprint() != waves(["cat", "dog"], seed=1).fingerprint()


def test_waves_of_near_corners_are_alike_and_those_of_cells_are_not_before_anything_is_learned():
    def unlikeness(conditioner: TextConditioner, other: str) -> float:
        tokens = conditioner.encode(["cat 0.25 0.25 0.75 0.75", other]).tokens
        return (tokens[0] - tokens[1]).norm().item()

    near, far = "cat 0.25 0.25 0.765625 0.75", "cat 0 0 0.25 1"
    assert unlikeness(waves(["cat"]), near) < 0.5 * unlikeness(waves(["cat"]), far)
    sizes = LayoutConfig(names=["cat"], vocab_size=4226, max_objects=2, width=16, layers=1, heads=2)
    cells = build_conditioner(ConditionerConfig(kind="layout", layout=sizes)).eval()
    assert unlikeness(cells, near) > 0.5 * unlikeness(cells, far)


def test_what_waves_have_not_is_refused():
    with pytest.raises(ValueError, match="layout.layers 2 is of the reader cells; leave it out"):
        LayoutConfig(reader="waves", layers=2)
    with pytest.raises(ValueError, match="layout.reader 'wave' is unknown; use one of cells, waves"):
        LayoutConfig(reader="wave")
    LayoutConfig(reader="waves", width=20)  # which heads need not divide: there are none


def test_waves_in_half_precision_are_those_of_float32_rounded():
    conditioner = waves(["cat", "dog"])
    ids = conditioner.tokenize(["cat 0.1 0.2 0.5 0.9; dog 0.5 0.5 1 1"]).ids
    cells = ids[:, :-2].unflatten(1, (-1, 3))[..., 1:]
    exact = conditioner.encoder._waves(cells)
    assert (conditioner.bfloat16().encoder._waves(cells) - exact).abs().max() < 0.005
    assert conditioner.encode(["cat 0.1 0.2 0.5 0.9"]).tokens.dtype == torch.bfloat16


def test_diffusers_is_told_that_it_has_no_such_reader():
    assert waves(["cat"]).components["text_encoder"] == [None, "BoxEncoder"]
