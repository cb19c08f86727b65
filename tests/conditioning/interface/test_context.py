"""Tests of Context: batches are concatenated, selected and dropped, and padding is masked."""

import pytest
import torch

from conditioning import Context, drop_context


def full(batch: int, length: int = 3, seed: int = 0, mask: bool = True) -> Context:
    g = torch.Generator().manual_seed(seed)
    return Context(
        tokens=torch.randn(batch, length, 4, generator=g),
        mask=torch.rand(batch, length, generator=g) > 0.3 if mask else None,
        vector=torch.randn(batch, 5, generator=g),
        latents=torch.randn(batch, 2, 3, 3, generator=g),
    )


def same(a: Context, b: Context) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("tokens", "mask", "vector", "latents")]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def test_select_after_cat_returns_the_parts():
    a, b = full(2), full(3, seed=1)
    both = a.cat(b)
    assert both.batch_size == 5
    assert same(both.select(slice(0, 2)), a) and same(both.select(slice(2, 5)), b)
    assert same(both.select(torch.tensor([2, 3, 4])), b)
    assert same(both.select(4), b.select(-1))


def test_cat_pads_the_shorter_tokens_and_masks_the_padding():
    short, long = full(1, length=2, mask=False), full(1, length=5, mask=False, seed=1)
    for joined, i in ((short.cat(long), 0), (long.cat(short), 1)):
        assert joined.tokens.shape == (2, 5, 4)
        assert joined.mask[i].tolist() == [True, True, False, False, False] and joined.mask[1 - i].all()
        assert torch.equal(joined.tokens[i, :2], short.tokens[0]) and not joined.tokens[i, 2:].any()


def test_cat_of_equal_lengths_without_masks_has_no_mask():
    assert full(1, mask=False).cat(full(2, mask=False)).mask is None


def test_cat_adds_the_mask_that_only_one_has():
    a, b = full(1, mask=False), full(1)
    joined = a.cat(b)
    assert joined.mask[0].all() and torch.equal(joined.mask[1:], b.mask)


def test_repeat_is_cat_with_itself_without_a_copy():
    one = full(1)
    three = one.repeat(3)
    assert same(three, one.cat(one).cat(one))
    assert three.tokens.data_ptr() == one.tokens.data_ptr()
    with pytest.raises(ValueError, match="batch size 1"):
        full(2).repeat(2)


def test_where_selects_per_member():
    a, b = full(3), full(3, seed=1)
    keep = torch.tensor([True, False, True])
    mixed = a.where(keep, b)
    for i, is_kept in enumerate(keep):
        assert same(mixed.select(i), (a if is_kept else b).select(i))


def test_drop_context_replaces_only_dropped_members():
    context, null = full(4), full(1, seed=9)
    drop = torch.tensor([True, False, False, True])
    mixed = drop_context(context, null, drop)
    for i, dropped in enumerate(drop):
        assert same(mixed.select(i), null if dropped else context.select(i))
    assert same(drop_context(context, null, torch.zeros(4, dtype=torch.bool)), context)


def test_drop_context_masks_the_padding_of_a_shorter_null():
    context, null = full(2, length=5, mask=False), full(1, length=2, mask=False)
    mixed = drop_context(context, null, torch.tensor([True, False]))
    assert mixed.mask.tolist() == [[True, True, False, False, False], [True] * 5]


def test_gradients_reach_only_selected_members():
    tokens, null = torch.ones(2, 1, 1, requires_grad=True), torch.ones(1, 1, 1, requires_grad=True)
    mixed = drop_context(Context(tokens=tokens), Context(tokens=null), torch.tensor([True, False]))
    mixed.tokens.sum().backward()
    assert tokens.grad.flatten().tolist() == [0, 1] and null.grad.item() == 1


def test_to_converts_floats_and_keeps_the_mask_bool():
    half = full(2).to(dtype=torch.float16)
    assert (half.tokens.dtype, half.vector.dtype, half.latents.dtype) == (torch.float16,) * 3
    assert half.mask.dtype == torch.bool
    assert same(full(2).to("cpu"), full(2))


def test_a_context_without_fields_has_no_batch_size():
    empty = Context()
    assert same(empty.cat(empty), empty) and same(empty.repeat(3), empty) and same(empty.to("cpu"), empty)
    with pytest.raises(ValueError, match="no batch size"):
        _ = empty.batch_size


def test_fields_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="must have one batch size"):
        Context(tokens=torch.zeros(2, 3, 4), vector=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="does not fit tokens"):
        Context(tokens=torch.zeros(2, 3, 4), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="has vector and the other"):
        full(1).cat(Context(tokens=torch.zeros(1, 3, 4)))
    with pytest.raises(ValueError, match=r"bool \[2\]"):
        full(2).where(torch.ones(2), full(2))
    with pytest.raises(IndexError, match="index 2 is out of range"):
        full(2).select(2)
