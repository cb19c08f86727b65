"""Optimizers: the learning rate in closed form, clipping, update rules, skipped steps, exact resume."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stipple.training.optimization.optimizer import Optimizer
from stipple.training.optimization.update_rules import OptimizerConfig
from stipple_core.files.training_state import load_state, save_state


def config(**changes) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 0.1, "warmup_steps": 0, "clip_norm": 0.0, **changes})


def network(memory_format=torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)).to(memory_format=memory_format)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.backward(model(images).square().mean())
        optimizer.step(step, 100, optimizer.gradient_norm())


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_learning_rate_rises_linearly_and_is_constant_afterwards():
    rates = [config(warmup_steps=4).rate(step, 100) for step in range(8)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.05), ("linear", 0.05), ("constant", 0.1)])
def test_schedules_fall_to_zero_over_the_steps_after_the_warm_up(schedule, half):
    settings = config(warmup_steps=10, schedule=schedule)
    rates = [settings.rate(step, 110) for step in (10, 60, 110, 500)]
    assert rates[:2] == pytest.approx([0.1, half])
    assert rates[2:] == pytest.approx([0.1, 0.1] if schedule == "constant" else [0, 0])
    cosine = 0.05 * (1 + math.cos(math.pi * 0.25))
    assert schedule != "cosine" or settings.rate(35, 110) == pytest.approx(cosine)


def test_an_unknown_schedule_is_refused_with_a_list_of_schedules():
    with pytest.raises(ValueError, match="optimizer.schedule 'cosin' is unknown; use one of constant, cosine, linear"):
        Optimizer([network()], config(schedule="cosin"))


def test_updates_equal_those_of_torch_adamw_with_decay_on_matrices_only():
    model, reference = network().double(), network().double()
    optimizer = Optimizer([model], config(weight_decay=0.1))
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    rest = [p for p in reference.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.1, weight_decay=0.1)
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(5):
        optimizer.backward(model(images).square().mean())
        optimizer.step(step, 100, optimizer.gradient_norm())
        reference(images).square().mean().backward()
        adamw.step()
        adamw.zero_grad()
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(own, expected, rtol=1e-9, atol=1e-12)


def test_clipping_bounds_the_global_norm_and_the_unclipped_norm_is_reported():
    model, seen = nn.Linear(3, 1, bias=False), []
    optimizer = Optimizer([model], config(clip_norm=1.0))
    optimizer.rules[0].register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
    optimizer.backward((model.weight * torch.tensor([[3.0, 0.0, 4.0]])).sum())
    norm = optimizer.gradient_norm()
    optimizer.step(0, 10, norm)
    assert norm.item() == pytest.approx(5)
    assert seen[0].flatten().tolist() == pytest.approx([0.6, 0, 0.8], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_changes_neither_weights_nor_moments(bad):
    model = network()
    optimizer = Optimizer([model], config(clip_norm=1.0))
    train(model, optimizer, range(2))
    before = weights(model)
    moments = [value.clone() for state in optimizer.rules[0].state.values() for value in state.values()]
    optimizer.backward(model(torch.ones(1, 4, 8, 8)).mean() * bad)
    assert not torch.isfinite(optimizer.gradient_norm()) and optimizer.skip(losses_finite=True)
    assert equal(weights(model), before)
    assert equal([value for state in optimizer.rules[0].state.values() for value in state.values()], moments)
    assert all(p.grad is None for p in model.parameters())
    train(model, optimizer, range(3, 4))
    assert not equal(weights(model), before)


def test_the_fp16_loss_scale_is_undone_before_clipping_and_halved_after_an_overflow():
    model, scaled = network(), network()
    plain, fp16 = Optimizer([model], config(clip_norm=0.1)), Optimizer([scaled], config(clip_norm=0.1), fp16=True)
    train(model, plain, range(3))
    train(scaled, fp16, range(3))
    for a, b in zip(weights(model), weights(scaled), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    scale, before = fp16.scaler.get_scale(), weights(scaled)
    fp16.backward(scaled(torch.ones(1, 4, 8, 8)).mean() * math.inf)
    assert not torch.isfinite(fp16.gradient_norm()) and not fp16.skip(losses_finite=True)
    assert fp16.scaler.get_scale() == scale / 2 and equal(weights(scaled), before)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_restored_optimizer_continues_bit_for_bit_in_any_memory_format(memory_format, fp16, tmp_path):
    """Fused AdamW reads raw memory, so moments with other strides would be applied to other weights."""
    whole, broken = network(memory_format), network(memory_format)
    uninterrupted, before = Optimizer([whole], config(), fp16), Optimizer([broken], config(), fp16)
    train(whole, uninterrupted, range(5))
    train(broken, before, range(2))
    save_state(tmp_path, before.state_dict())
    after = Optimizer([broken], config(), fp16)
    after.load_state_dict(load_state(tmp_path))
    train(broken, after, range(2, 5))
    assert equal(weights(broken), weights(whole))


KINDS = ["adamw", "adamw8bit", "muon"]


def wide(memory_format=torch.contiguous_format) -> nn.Module:
    """A model whose middle layers have enough channels for Muon and enough numbers for bitsandbytes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 32, 3), nn.GroupNorm(2, 32), nn.Conv2d(32, 16, 3), nn.Flatten(), nn.Linear(256, 16)]
    return nn.Sequential(*layers).to(memory_format=memory_format)


def of_kind(kind: str, **changes) -> OptimizerConfig:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return config(kind=kind, learning_rate=0.01, **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_kind_continues_bit_for_bit_when_it_is_restored(kind, memory_format, tmp_path):
    settings = of_kind(kind, clip_norm=0.5, schedule="cosine")
    whole, broken = wide(memory_format), wide(memory_format)
    uninterrupted, before = Optimizer([whole], settings), Optimizer([broken], settings)
    train(whole, uninterrupted, range(6))
    train(broken, before, range(3))
    save_state(tmp_path, {"optimizer": before.state_dict(), "weights": broken.state_dict()})
    again = wide(memory_format)
    after = Optimizer([again], settings)
    saved = load_state(tmp_path)
    again.load_state_dict(saved["weights"])
    after.load_state_dict(saved["optimizer"])
    train(again, after, range(3, 6))
    assert equal(weights(again), weights(whole)) and not equal(weights(again), weights(wide()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_saved_in_one_memory_format_is_restored_in_another(kind, tmp_path):
    """For example from channels_last on a GPU to partitioned weights, which are contiguous."""
    last, first = wide(torch.channels_last), wide()
    before, after = Optimizer([last], of_kind(kind)), Optimizer([first], of_kind(kind))
    train(last, before, range(3))
    save_state(tmp_path, {"optimizer": before.state_dict(), "weights": last.state_dict()})
    saved = load_state(tmp_path)
    first.load_state_dict(saved["weights"])
    after.load_state_dict(saved["optimizer"])
    for moments, again in zip(*(o.state_dict()["moments"].values() for o in (before, after)), strict=True):
        assert all(torch.equal(moments[name], again[name]) for name in moments) and moments.keys() == again.keys()
    train(last, before, range(3, 4))
    train(first, after, range(3, 4))
    # the order of columns affects the rounding of Muon's products
    for a, b in zip(weights(last), weights(first), strict=True):
        assert torch.allclose(a, b, atol=1e-6 if kind == "adamw" else 5e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_updates_hidden_matrices_by_orthogonal_steps_and_adamw_updates_the_rest(
    memory_format,
):
    after = {}
    for kind in ("muon", "adamw"):
        model, draws = wide(memory_format), torch.Generator().manual_seed(1)
        before = weights(model)
        optimizer = Optimizer([model], of_kind(kind, weight_decay=0.0))
        optimizer.backward(sum((p * torch.randn(p.shape, generator=draws)).sum() for p in model.parameters()))
        optimizer.step(0, 10, optimizer.gradient_norm())
        after[kind] = weights(model)
    for index in (4, 6):  # the inner convolution and the linear layer
        moved = (after["muon"][index] - before[index]).flatten(1)
        singular = torch.linalg.svdvals(moved)
        assert singular.max() < 2 * singular.min()
        assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)
    for index in (0, 1, 2, 3, 5, 7):
        assert torch.equal(after["muon"][index], after["adamw"][index])


def test_embeddings_are_updated_by_adamw_and_not_by_muon():
    table, settings = nn.Embedding(20, 20), of_kind("muon")
    assert [type(rule).__name__ for rule in Optimizer([table], settings).rules] == ["AdamW"]
    assert [type(rule).__name__ for rule in Optimizer([nn.Linear(20, 20)], settings).rules] == ["Muon", "AdamW"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_uses_the_learning_rate_of_the_step(kind):
    model = wide()
    optimizer = Optimizer([model], of_kind(kind, warmup_steps=4))
    train(model, optimizer, range(2, 3))
    assert {group["lr"] for rule in optimizer.rules for group in rule.param_groups} == {0.01 * 3 / 4}


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_forget_clears_the_moments_of_some_rows_only(kind):
    model = nn.Linear(128, 64, bias=False)
    optimizer = Optimizer([model], of_kind(kind, weight_decay=0.0))
    optimizer.backward((model.weight * torch.arange(1.0, 65)[:, None]).sum())
    optimizer.step(0, 10, optimizer.gradient_norm())
    before = model.weight.detach().clone()
    optimizer.forget(model.weight, torch.tensor([3, 5]))
    optimizer.backward((model.weight * 0).sum())
    optimizer.step(1, 10, optimizer.gradient_norm())
    moved = (model.weight.detach() - before).abs().amax(1)
    assert moved[[3, 5]].max() < 1e-6 and moved[[2, 4, 6]].min() > 1e-3


def test_adamw8bit_stores_moments_of_one_byte_and_no_other_large_tensors():
    model = wide()
    optimizer = Optimizer([model], of_kind("adamw8bit"))
    train(model, optimizer, range(1))
    moments = optimizer.state_dict()["moments"]["4"]  # the inner convolution
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    assert moments["absmax1"].numel() == model[2].weight.numel() // 256


def test_the_rate_of_wsd_depends_on_the_number_of_steps_only_in_the_last_ones_where_it_falls_to_zero():
    settings = config(warmup_steps=4, schedule="wsd", decay_steps=10)
    short, long = ([settings.rate(step, steps) for step in range(50)] for steps in (50, 1000))
    assert short[:41] == long[:41] and set(long[4:]) == {0.1}
    assert short[40:] == pytest.approx([0.1 * left / 10 for left in range(10, 0, -1)])


def test_adamw_beside_muon_has_its_own_multiple_of_the_learning_rate():
    model = wide()
    optimizer = Optimizer([model], of_kind("muon", adamw_rate=0.25))
    train(model, optimizer, range(1))
    rates = [{group["lr"] for group in rule.param_groups} for rule in optimizer.rules]
    assert rates == [{0.01}, {0.0025}]


def test_a_kind_that_is_unknown_or_not_installed_is_refused_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match="optimizer.kind 'adamv' is unknown; use one of adamw, adamw8bit, muon"):
        config(kind="adamv")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="adamw8bit needs bitsandbytes; pip install bitsandbytes, or use adamw"):
        config(kind="adamw8bit")


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="its kind is adamw, not muon"):
        Optimizer([wide()], of_kind("muon")).load_state_dict(Optimizer([wide()], config()).state_dict())
