"""Tests of layouts as prompts: ids of LDM's layout model, both encoders, and storage."""

import pytest
import torch

from conditioning import TextConditioner, conditioner_from_compvis, load_conditioner
from conditioning.conditioners import ConditionerConfig, build_conditioner
from conditioning.layouts.layout_tokenizer import LayoutConfig, LayoutTokenizer
from tests.helpers.models.small_encoders import ldm_bert_shapes

EMPTY, WHOLE = 8191, [0, 89 * 90 + 89]  # the grid of 8192 tokens has 90 x 90 cells


def test_an_object_is_its_class_and_two_corners_and_the_crop_is_last():
    tokenizer = LayoutTokenizer(8192, 11)
    tokens = tokenizer(["17 0.1 0.2 0.5 0.9; 3 0 0 1 1", ""])
    cells = [round(0.2 * 89) * 90 + round(0.1 * 89), round(0.9 * 89) * 90 + round(0.5 * 89)]
    assert tokens.ids.tolist() == [[17, *cells, 3, *WHOLE, *[EMPTY] * 3, *WHOLE], [EMPTY] * 9 + WHOLE]
    assert tokens.mask.all()


def test_objects_that_do_not_fit_are_cut():
    tokenizer = LayoutTokenizer(8192, 5)
    assert tokenizer.cut("1 0 0 1 1; 2 0 0 1 1;3 0 0 .5 1") == "2 0 0 1 1; 3 0 0 .5 1"
    assert tokenizer.cut("1 0 0 1 1;") == "" == tokenizer.cut("")
    assert torch.equal(tokenizer(["1 0 0 1 1; 2 0 0 1 1"]).ids, tokenizer(["1 0 0 1 1"]).ids)


@pytest.mark.parametrize(
    "prompt", ("a cat", "1 0 0 1", "1 0 0 1 1 1", "8191 0 0 1 1", "-1 0 0 1 1", "1 0 0 2 1", "1 1 0 0 1")
)
def test_an_invalid_object_raises_in_one_line(prompt):
    with pytest.raises(ValueError, match='is not an object of a layout: .*"CLASS LEFT TOP RIGHT BOTTOM"') as caught:
        LayoutTokenizer(8192, 92)([prompt])
    assert "\n" not in str(caught.value)


def test_a_layout_model_opens_without_a_tokenizer_and_loads_back_equal(tmp_path):
    sizes = ldm_bert_shapes(layers=1, width=16, vocab_size=8192, length=92)
    conditioner = conditioner_from_compvis({name: torch.randn(shape) for name, shape in sizes.items()})
    tokens = conditioner.encode(["17 0.1 0.2 0.5 0.9", ""]).tokens
    assert tokens.shape == (2, 92, 16) and conditioner.max_length == 92
    conditioner.save(tmp_path)
    loaded = load_conditioner(tmp_path)
    assert torch.equal(loaded.encode(["17 0.1 0.2 0.5 0.9", ""]).tokens, tokens)
    assert loaded.fingerprint() == load_conditioner(tmp_path).fingerprint()


def test_no_grid_cell_is_the_id_of_an_empty_place():
    tokenizer = LayoutTokenizer(LayoutConfig(vocab_size=26).vocab_size, 5)
    last = tokenizer(["0 1 1 1 1"]).ids[0, 1].item()
    assert last == 24 and tokenizer([""]).ids[0, 0] == 25
    with pytest.raises(ValueError, match="layout.vocab_size 25 is a square, .* no id for empty places; use 26"):
        LayoutConfig(vocab_size=25)


def waves(names: list[str], seed: int = 0) -> TextConditioner:
    """Return a conditioner of layouts that reads corners as Fourier features, on a grid of 65 x 65 cells."""
    config = LayoutConfig(names=names, vocab_size=4226, max_objects=2, width=16, reader="waves")
    return build_conditioner(ConditionerConfig(kind="layout", layout=config), seed=seed).eval()


def test_waves_are_a_token_per_object_and_one_of_the_whole_picture_and_load_back_equal(tmp_path):
    conditioner = waves(["cat", "dog"])
    conditioner.trainable = False  # no gradients: each prompt is encoded alone
    prompts = ["cat 0 0 0.5 0.5; dog 0.5 0.5 1 1", "cat 0 0 0.5 0.5", ""]
    tokens = conditioner.encode(prompts).tokens
    assert tokens.shape == (3, 3, 16)
    for a, b in ((tokens[0, 0], tokens[1, 0]), (tokens[1, 1], tokens[2, 1]), (tokens[0, 2], tokens[2, 2])):
        assert torch.allclose(a, b, atol=1e-5)  # a token depends only on its own object
    assert not torch.allclose(tokens[0, 0], conditioner.encode(["dog 0 0 0.5 0.5"]).tokens[0, 0], atol=0.1)
    conditioner.save(tmp_path)
    loaded = load_conditioner(tmp_path)
    assert torch.equal(loaded.encode(prompts).tokens, tokens)
    assert loaded.fingerprint() == conditioner.fingerprint() != waves(["cat", "dog"], seed=1).fingerprint()


def test_waves_of_nearby_corners_are_similar_before_training_and_cells_are_not():
    def distance(conditioner: TextConditioner, other: str) -> float:
        tokens = conditioner.encode(["cat 0.25 0.25 0.75 0.75", other]).tokens
        return (tokens[0] - tokens[1]).norm().item()

    near, far = "cat 0.25 0.25 0.765625 0.75", "cat 0 0 0.25 1"
    assert distance(waves(["cat"]), near) < 0.5 * distance(waves(["cat"]), far)
    sizes = LayoutConfig(names=["cat"], vocab_size=4226, max_objects=2, width=16, layers=1, heads=2)
    cells = build_conditioner(ConditionerConfig(kind="layout", layout=sizes)).eval()
    assert distance(cells, near) > 0.5 * distance(cells, far)


def test_options_of_cells_raise_for_waves():
    with pytest.raises(ValueError, match="layout.layers 2 requires layout.reader cells; remove it"):
        LayoutConfig(reader="waves", layers=2)
    with pytest.raises(ValueError, match="layout.reader 'wave' is unknown; use one of cells, waves"):
        LayoutConfig(reader="wave")
    LayoutConfig(reader="waves", width=20)  # need not be divisible by heads


def test_waves_in_half_precision_are_rounded_from_float32():
    conditioner = waves(["cat", "dog"])
    ids = conditioner.tokenize(["cat 0.1 0.2 0.5 0.9; dog 0.5 0.5 1 1"]).ids
    cells = ids[:, :-2].unflatten(1, (-1, 3))[..., 1:]
    exact = conditioner.encoder._fourier_features(cells)
    assert (conditioner.bfloat16().encoder._fourier_features(cells) - exact).abs().max() < 0.005
    assert conditioner.encode(["cat 0.1 0.2 0.5 0.9"]).tokens.dtype == torch.bfloat16


def test_model_index_names_no_library_for_waves():
    assert waves(["cat"]).components["text_encoder"] == [None, "BoxEncoder"]
