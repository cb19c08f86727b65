"""Tests of conditioners with readers: contexts, caption dropout, storage, and how to add a reader."""

from __future__ import annotations

import json

import pytest
import torch

from conditioning import Context, Unconditional
from conditioning.conditioners import ConditionerConfig, build_conditioner, load_conditioner
from conditioning.encoders.scratch import TransformerConfig
from conditioning.hints.hints import SpatialConfig
from conditioning.interface.input_reader import InputReader, Widths
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.combined import CombinedConditioner, joined
from conditioning.readers.frame import FrameConfig
from stipple.stages.ldm.batch_encoder import BatchEncoder
from stipple_core.data.dataset import Batch

CAPTIONS = ["a red heart", "a green heart", "a blue square"]
SCRATCH = TransformerConfig(vocab_size=514, width=16, layers=1, heads=2, max_length=8)


def build(**sections) -> CombinedConditioner:
    return build_conditioner(ConditionerConfig(kind="scratch", scratch=SCRATCH, **sections), CAPTIONS)


def depth_and_frame() -> CombinedConditioner:
    return build(spatial=SpatialConfig(kind="depth", downsampling=4), frame=FrameConfig(width=8))


def inputs_of(prompts=tuple(CAPTIONS), seed: int = 0) -> ConditionInputs:
    draw, size = torch.Generator().manual_seed(seed), len(prompts)
    return ConditionInputs(
        prompts=list(prompts),
        hint=torch.randn(size, 1, 16, 16, generator=draw),
        frame=torch.randint(0, 500, (size, 6), generator=draw).float(),
    )


def same(a: Context, b: Context, tolerance: float = 0.0) -> bool:
    fields = ("tokens", "mask", "vector", "latents")
    pairs = [(getattr(a, name), getattr(b, name)) for name in fields]
    return all(x is y is None or torch.allclose(x.float(), y.float(), rtol=0, atol=tolerance) for x, y in pairs)


class FixedReader(InputReader):
    """Returns a fixed context."""

    reads = frozenset()

    def __init__(self, widths: Widths, **context: torch.Tensor):
        super().__init__()
        self.widths, self.context = widths, context

    def forward(self, inputs: ConditionInputs) -> Context:
        return Context(**self.context)


def test_all_fields_of_a_context_have_the_widths_of_the_conditioner():
    conditioner = depth_and_frame()
    context = conditioner.encode(CAPTIONS, inputs_of())
    assert context.tokens.shape == (3, 8, conditioner.context_dim)
    assert context.vector.shape == (3, conditioner.vector_dim) == (3, 48)
    assert context.latents.shape == (3, conditioner.latent_channels, 4, 4) == (3, 1, 4, 4)
    assert conditioner.reads >= {"hint", "frame"}


def test_both_contexts_of_guidance_in_one_batch_equal_those_made_separately():
    conditioner, inputs = depth_and_frame(), inputs_of()
    both = inputs.cat(inputs.null())
    tokens = conditioner.tokenize(both.prompts)
    with torch.no_grad():
        at_once = conditioner(tokens.ids, tokens.mask, both)
        assert same(at_once.select(slice(0, 3)), conditioner.encode(CAPTIONS, inputs), 1e-6)
        assert same(at_once.select(slice(3, 6)), conditioner.encode([""] * 3, inputs.null()), 1e-6)


def test_equal_prompts_are_encoded_once(monkeypatch):
    conditioner, sizes = depth_and_frame(), []
    encoder = conditioner.prompts.forward
    monkeypatch.setattr(conditioner.prompts, "forward", lambda ids, mask: sizes.append(len(ids)) or encoder(ids, mask))
    inputs = inputs_of(["a red heart"] * 5)
    both = inputs.cat(inputs.null())
    tokens = conditioner.tokenize(both.prompts)
    context = conditioner(tokens.ids, tokens.mask, both)
    assert sizes == [2] and len(context.tokens) == 10
    assert torch.equal(context.tokens[0], context.tokens[4]) and not torch.equal(context.tokens[0], context.tokens[5])


def test_gradients_reach_prompts_that_share_a_row():
    conditioner = depth_and_frame()
    inputs = inputs_of(["a red heart", "a red heart", "a green heart"])
    tokens = conditioner.tokenize(inputs.prompts)
    conditioner(tokens.ids, tokens.mask, inputs).tokens[1].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in conditioner.prompts.parameters())


def test_tokens_are_concatenated_with_a_mask_if_any_of_them_has_one():
    a = Context(tokens=torch.zeros(2, 3, 4), mask=torch.tensor([[True, False, False]] * 2), vector=torch.zeros(2, 1))
    b = Context(tokens=torch.ones(2, 2, 4), vector=torch.ones(2, 5), latents=torch.ones(2, 1, 2, 2))
    context = joined([a, b])
    assert context.tokens[:, :, 0].tolist() == [[0, 0, 0, 1, 1]] * 2
    assert context.mask.tolist() == [[True, False, False, True, True]] * 2
    assert context.vector.tolist() == [[0, 1, 1, 1, 1, 1]] * 2
    assert context.latents is b.latents


def test_tokens_of_different_widths_raise():
    with pytest.raises(ValueError, match=r"widths \[4, 16\] can't be concatenated"):
        CombinedConditioner(build().prompts, {"other": FixedReader(Widths(tokens=4))})


def test_a_missing_input_raises():
    with pytest.raises(ValueError, match="requires hint besides prompts, and it is missing"):
        depth_and_frame().encode(["a"], ConditionInputs(prompts=["a"], frame=torch.zeros(1, 6)))


def test_a_conditioner_loads_back_equal_from_a_folder(tmp_path):
    conditioner, inputs = depth_and_frame(), inputs_of()
    conditioner.save(tmp_path)
    again = load_conditioner(tmp_path)
    assert list(again.readers) == ["spatial", "frame"]
    assert again.readers["spatial"].config == conditioner.readers["spatial"].config
    assert same(conditioner.encode(CAPTIONS, inputs), again.encode(CAPTIONS, inputs))


def test_weights_of_readers_load_back_equal_and_trainable(tmp_path):
    conditioner = build(spatial=SpatialConfig(kind="semantic", downsampling=4, classes=5))
    conditioner.save(tmp_path)
    again = load_conditioner(tmp_path)
    before, after = conditioner.readers["spatial"].state_dict(), again.readers["spatial"].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in again.readers.parameters()] == [True]
    assert not again.prompts.trainable and again.trainable


def test_an_unknown_reader_or_option_in_a_folder_raises(tmp_path):
    depth_and_frame().save(tmp_path)
    path = tmp_path / "conditioner" / "config.json"
    configs = json.loads(path.read_text())
    path.write_text(json.dumps({**configs, "smell": {}}))
    with pytest.raises(ValueError, match="unknown reader 'smell'; it must be one of spatial, frame"):
        load_conditioner(tmp_path)
    path.write_text(json.dumps({"frame": {"wdith": 3}}))
    with pytest.raises(ValueError, match="wdith"):
        load_conditioner(tmp_path)


def test_inputs_are_concatenated_selected_and_dropped():
    inputs = inputs_of()
    both = inputs.cat(inputs.null())
    assert len(both) == 6 and both.dropped.tolist() == [False] * 3 + [True] * 3
    assert both.prompts == [*CAPTIONS, "", "", ""]
    back = both.select(slice(0, 3))
    assert back.prompts == inputs.prompts
    assert torch.equal(back.hint, inputs.hint) and torch.equal(back.frame, inputs.frame)
    alone = ConditionInputs(prompts=CAPTIONS)
    assert alone.null().prompts == [""] and len(alone.cat(alone.null())) == 4
    with pytest.raises(ValueError, match="one batch has frame"):
        inputs.cat(alone)
    with pytest.raises(ValueError, match="one batch size"):
        ConditionInputs(prompts=["a"], frame=torch.zeros(2, 6))


def test_caption_dropout_of_an_unconditional_model_changes_nothing():
    context = Unconditional().encode(["", ""])
    assert context.where(torch.tensor([True, False]), Unconditional().null()) == Context()


def test_readers_that_survive_dropout_run_once_for_both_contexts_of_guidance(monkeypatch):
    conditioner, inputs, seen = depth_and_frame(), inputs_of(), []
    both = inputs.cat(inputs.null())
    tokens = conditioner.tokenize(both.prompts)
    with torch.no_grad():
        expected = conditioner(tokens.ids, tokens.mask, both)
        spatial = conditioner.readers["spatial"]
        forward = spatial.forward
        monkeypatch.setattr(spatial, "forward", lambda inputs: seen.append(len(inputs)) or forward(inputs))
        assert same(conditioner(tokens.ids, tokens.mask, inputs), expected)
        dropping = build(spatial=SpatialConfig(kind="depth", downsampling=4, drop=True))
        context = dropping(tokens.ids, tokens.mask, inputs)
    assert seen == [3]
    assert context.latents[:3].any() and not context.latents[3:].any()


def test_no_null_context_is_computed_without_caption_dropout():
    conditioner, inputs = depth_and_frame(), inputs_of()
    batch = Batch(torch.zeros(3, 3, 16, 16), CAPTIONS, torch.arange(3), inputs.hint, inputs.frame)
    contexts, seen = {}, []

    def network(ids: torch.Tensor, mask: torch.Tensor, inputs: ConditionInputs) -> Context:
        seen.append(len(ids))
        return conditioner(ids, mask, inputs)

    for nulls in (False, True):
        inputs = BatchEncoder(None, conditioner, network, None, nulls)
        with torch.no_grad():
            contexts[nulls] = inputs.contexts(batch, torch.device("cpu"))
    assert seen == [3, 6] and contexts[False][1] is None and contexts[True][1].tokens.shape == (3, 8, 16)
    assert same(contexts[False][0], contexts[True][0], 1e-6)
