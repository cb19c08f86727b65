"""Conditioners that read more than prompts: what is given arrives in the context, and what is dropped does not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from conditioning import Context, Unconditional
from conditioning.build import ConditionerConfig, build_conditioner, load_conditioner
from conditioning.encoders.scratch import TransformerConfig
from conditioning.hints.hints import SpatialConfig
from conditioning.interface.inputs import ConditionInputs
from conditioning.interface.reader import Widths
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


def given(prompts=tuple(CAPTIONS), seed: int = 0) -> ConditionInputs:
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


class Told(nn.Module):
    """A reader that says what it is made of."""

    reads, trainable = frozenset(), False

    def __init__(self, widths: Widths, **context: torch.Tensor):
        super().__init__()
        self.widths, self.context = widths, context

    def forward(self, given: ConditionInputs) -> Context:
        return Context(**self.context)


def test_every_field_of_a_context_is_filled_and_its_widths_are_foretold():
    conditioner = depth_and_frame()
    context = conditioner.encode(CAPTIONS, given())
    assert context.tokens.shape == (3, 8, conditioner.context_dim)
    assert context.vector.shape == (3, conditioner.vector_dim) == (3, 48)
    assert context.latents.shape == (3, conditioner.latent_channels, 4, 4) == (3, 1, 4, 4)
    assert conditioner.reads >= {"hint", "frame"}


def test_both_contexts_of_guidance_made_at_once_are_those_made_one_by_one():
    conditioner, told = depth_and_frame(), given()
    both = told.cat(told.null())
    tokens = conditioner.tokenize(both.prompts)
    with torch.no_grad():
        at_once = conditioner(tokens.ids, tokens.mask, both)
        assert same(at_once.select(slice(0, 3)), conditioner.encode(CAPTIONS, told), 1e-6)
        assert same(at_once.select(slice(3, 6)), conditioner.encode([""] * 3, told.null()), 1e-6)


def test_a_prompt_that_many_share_is_encoded_once(monkeypatch):
    conditioner, seen = depth_and_frame(), []
    encoder = conditioner.prompts.forward
    monkeypatch.setattr(conditioner.prompts, "forward", lambda ids, mask: seen.append(len(ids)) or encoder(ids, mask))
    told = given(["a red heart"] * 5)
    both = told.cat(told.null())
    tokens = conditioner.tokenize(both.prompts)
    context = conditioner(tokens.ids, tokens.mask, both)
    assert seen == [2] and len(context.tokens) == 10
    assert torch.equal(context.tokens[0], context.tokens[4]) and not torch.equal(context.tokens[0], context.tokens[5])


def test_gradients_reach_every_prompt_whose_row_is_shared():
    conditioner = depth_and_frame()
    told = given(["a red heart", "a red heart", "a green heart"])
    tokens = conditioner.tokenize(told.prompts)
    conditioner(tokens.ids, tokens.mask, told).tokens[1].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in conditioner.prompts.parameters())


def test_tokens_come_one_after_another_and_a_mask_is_made_where_one_of_them_has_one():
    a = Context(tokens=torch.zeros(2, 3, 4), mask=torch.tensor([[True, False, False]] * 2), vector=torch.zeros(2, 1))
    b = Context(tokens=torch.ones(2, 2, 4), vector=torch.ones(2, 5), latents=torch.ones(2, 1, 2, 2))
    context = joined([a, b])
    assert context.tokens[:, :, 0].tolist() == [[0, 0, 0, 1, 1]] * 2
    assert context.mask.tolist() == [[True, False, False, True, True]] * 2
    assert context.vector.tolist() == [[0, 1, 1, 1, 1, 1]] * 2
    assert context.latents is b.latents


def test_tokens_of_several_widths_are_refused():
    with pytest.raises(ValueError, match=r"widths \[4, 16\] can't be read together"):
        CombinedConditioner(build().prompts, {"other": Told(Widths(tokens=4))})


def test_what_is_not_given_is_named():
    with pytest.raises(ValueError, match="reads prompts and hint, which is not given"):
        depth_and_frame().encode(["a"], ConditionInputs(prompts=["a"], frame=torch.zeros(1, 6)))


def test_a_folder_gives_the_conditioner_back(tmp_path):
    conditioner, told = depth_and_frame(), given()
    conditioner.save(tmp_path)
    again = load_conditioner(tmp_path)
    assert list(again.readers) == ["spatial", "frame"]
    assert again.readers["spatial"].config == conditioner.readers["spatial"].config
    assert same(conditioner.encode(CAPTIONS, told), again.encode(CAPTIONS, told))


def test_weights_of_readers_come_back_and_learn_on(tmp_path):
    conditioner = build(spatial=SpatialConfig(kind="semantic", downsampling=4, classes=5))
    conditioner.save(tmp_path)
    again = load_conditioner(tmp_path)
    mine, its = conditioner.readers["spatial"].state_dict(), again.readers["spatial"].state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    assert [p.requires_grad for p in again.readers.parameters()] == [True]
    assert not again.prompts.trainable and again.trainable


def test_what_a_folder_says_of_an_unknown_reader_is_refused_in_one_line(tmp_path):
    depth_and_frame().save(tmp_path)
    path = tmp_path / "conditioner" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "smell": {}}))
    with pytest.raises(ValueError, match="reader 'smell', which is unknown; there are spatial, frame"):
        load_conditioner(tmp_path)
    path.write_text(json.dumps({"frame": {"wdith": 3}}))
    with pytest.raises(ValueError, match="wdith"):
        load_conditioner(tmp_path)


def test_given_cats_selects_and_drops():
    told = given()
    both = told.cat(told.null())
    assert len(both) == 6 and both.dropped.tolist() == [False] * 3 + [True] * 3
    assert both.prompts == [*CAPTIONS, "", "", ""]
    back = both.select(slice(0, 3))
    assert back.prompts == told.prompts and torch.equal(back.hint, told.hint) and torch.equal(back.frame, told.frame)
    alone = ConditionInputs(prompts=CAPTIONS)
    assert alone.null().prompts == [""] and len(alone.cat(alone.null())) == 4
    with pytest.raises(ValueError, match="one has hint"):
        told.cat(alone)
    with pytest.raises(ValueError, match="batch size"):
        ConditionInputs(prompts=["a"], frame=torch.zeros(2, 6))


def test_a_model_that_is_told_nothing_has_nothing_to_drop():
    context = Unconditional().encode(["", ""])
    assert context.where(torch.tensor([True, False]), Unconditional().null()) == Context()


def test_what_is_kept_is_read_once_for_both_contexts_of_guidance(monkeypatch):
    conditioner, told, seen = depth_and_frame(), given(), []
    both = told.cat(told.null())
    tokens = conditioner.tokenize(both.prompts)
    with torch.no_grad():
        expected = conditioner(tokens.ids, tokens.mask, both)
        spatial = conditioner.readers["spatial"]
        read = spatial.forward
        monkeypatch.setattr(spatial, "forward", lambda given: seen.append(len(given)) or read(given))
        assert same(conditioner(tokens.ids, tokens.mask, told), expected)
        dropping = build(spatial=SpatialConfig(kind="depth", downsampling=4, drop=True))
        context = dropping(tokens.ids, tokens.mask, told)
    assert seen == [3]
    assert context.latents[:3].any() and not context.latents[3:].any()


def test_where_nobody_is_dropped_no_null_context_is_made():
    conditioner, told = depth_and_frame(), given()
    batch = Batch(torch.zeros(3, 3, 16, 16), CAPTIONS, torch.arange(3), told.hint, told.frame)
    contexts, seen = {}, []

    def network(ids: torch.Tensor, mask: torch.Tensor, given: ConditionInputs) -> Context:
        seen.append(len(ids))
        return conditioner(ids, mask, given)

    for nulls in (False, True):
        inputs = BatchEncoder(None, conditioner, network, None, nulls)
        with torch.no_grad():
            contexts[nulls] = inputs.contexts(batch, torch.device("cpu"))
    assert seen == [3, 6] and contexts[False][1] is None and contexts[True][1].tokens.shape == (3, 8, 16)
    assert same(contexts[False][0], contexts[True][0], 1e-6)
