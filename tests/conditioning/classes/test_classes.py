"""Tests of conditioners without text: tables of classes, and unconditional models."""

import json

import pytest
import torch

from conditioning import ClassConditioner, Unconditional, conditioner_from_compvis, load_conditioner
from conditioning.formats.compvis_conditioner import conditioner_to_compvis


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(1001, 8, generator=torch.Generator().manual_seed(0))


def conditioner_of(table: torch.Tensor) -> ClassConditioner:
    return conditioner_from_compvis({"embedding.weight": table})


def test_a_class_number_is_its_row_and_the_empty_prompt_the_null_class(table):
    conditioner = conditioner_of(table)
    context = conditioner.encode(["207", "", " 0 "])
    assert torch.equal(context.tokens, table[[207, 1000, 0]][:, None]) and context.mask is None
    assert torch.equal(conditioner.null(3).tokens, table[[1000] * 3][:, None])
    assert (conditioner.context_dim, conditioner.max_length, conditioner.cut("207")) == (8, 1, "")
    tokens = conditioner.tokenize(["207", ""])  # as in training
    assert torch.equal(conditioner(tokens.ids, tokens.mask).tokens, context.tokens[:2])


@pytest.mark.parametrize("rows", (1001, 1000))
def test_classes_load_back_equal_from_a_folder_and_a_single_file(table, rows, tmp_path):
    conditioner = conditioner_of(table[:rows])
    conditioner.save(tmp_path)
    loaded = load_conditioner(tmp_path)
    assert loaded.fingerprint() == conditioner.fingerprint() and loaded.null_class == conditioner.null_class
    assert torch.equal(conditioner_to_compvis(loaded)["embedding.weight"], table[:rows])
    conditioner.save(tmp_path, dtype=torch.float16)
    assert load_conditioner(tmp_path).encode(["3"]).tokens.dtype == torch.float32
    assert load_conditioner(tmp_path, dtype=torch.float16).encode(["3"]).tokens.dtype == torch.float16
    assert load_conditioner(tmp_path).fingerprint() != conditioner.fingerprint()


def test_only_a_trainable_table_gets_gradients(table, tmp_path):
    conditioner_of(table).save(tmp_path)
    for trainable in (False, True):
        assert load_conditioner(tmp_path, trainable=trainable).encode(["7"]).tokens.requires_grad is trainable


@pytest.mark.parametrize(
    ("rows", "prompt", "message"),
    (
        (1001, "a cat", "prompt 'a cat' is not a class of this model; use a number from 0 to 999"),
        (1001, "1000", "prompt '1000' is not a class of this model; use a number from 0 to 999"),  # the null class
        (1000, "1000", "prompt '1000' is not a class of this model; use a number from 0 to 999"),
        (1000, "-1", "prompt '-1' is not a class"),
        (1000, "²", "prompt '²' is not a class"),
        (1000, "", "this model has 1000 classes but no null class.*use a class number and guidance_scale 1"),
    ),
)
def test_a_prompt_that_is_not_a_class_raises_in_one_line(table, rows, prompt, message):
    with pytest.raises(ValueError, match=message) as caught:
        conditioner_of(table[:rows]).encode([prompt])
    assert "\n" not in str(caught.value)


def test_the_context_of_an_unconditional_model_has_no_fields(tmp_path):
    conditioner = conditioner_from_compvis({})
    assert isinstance(conditioner, Unconditional) and conditioner.context_dim is None
    assert conditioner.encode(["", " "]).tokens is None and conditioner.null(2).tokens is None
    with pytest.raises(ValueError, match="prompt 'a cat' can't be used: this model is unconditional; leave it empty"):
        conditioner.encode(["a cat"])
    assert conditioner_to_compvis(conditioner) == {}


def test_a_model_folder_is_unconditional_only_if_its_index_names_no_text_encoder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_conditioner(tmp_path)
    Unconditional().save(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"]}))
    assert isinstance(load_conditioner(tmp_path), Unconditional)
    index.write_text(json.dumps(Unconditional.components))
    assert isinstance(load_conditioner(tmp_path), Unconditional)
    index.write_text(json.dumps({"text_encoder": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_conditioner(tmp_path)


def test_a_broken_table_raises_in_one_line_that_names_it(table, tmp_path):
    conditioner_of(table).save(tmp_path)
    path = tmp_path / "text_encoder/config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"num_classes": 10}, r"embedding.weight is \[1001, 8\], not \[10, 8\]"),
        ({"num_classes": "x"}, "does not describe a table of classes"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message) as caught:
            load_conditioner(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
