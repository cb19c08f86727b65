"""AdamW by the step: its learning rate in closed form, clipping, the guard against bad gradients, exact resume."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from storage.checkpoint import load_state, save_state
from training.optimizer import Optimizer, OptimizerConfig, learning_rate


def config(**changes) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 0.1, "warmup_steps": 0, "clip_norm": 0.0, **changes})


def network(memory_format=torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)).to(memory_format=memory_format)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.backward(model(images).square().mean())
        assert optimizer.step(step, 100)[1]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_learning_rate_rises_linearly_to_its_value_and_stays():
    rates = [learning_rate(config(warmup_steps=4), step, 100) for step in range(8)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.05), ("linear", 0.05), ("constant", 0.1)])
def test_schedules_go_from_the_whole_to_zero_over_the_steps_after_the_warm_up(schedule, half):
    settings = config(warmup_steps=10, schedule=schedule)
    rates = [learning_rate(settings, step, 110) for step in (10, 60, 110, 500)]
    assert rates[:2] == pytest.approx([0.1, half])
    assert rates[2:] == pytest.approx([0.1, 0.1] if schedule == "constant" else [0, 0])
    cosine = 0.05 * (1 + math.cos(math.pi * 0.25))
    assert schedule != "cosine" or learning_rate(settings, 35, 110) == pytest.approx(cosine)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="optimizer.schedule 'cosin' is unknown; use one of constant, cosine, linear"):
        Optimizer([network()], config(schedule="cosin"))


def test_updates_are_those_of_torch_adamw_with_decay_on_matrices_only():
    model, reference = network().double(), network().double()
    optimizer = Optimizer([model], config(weight_decay=0.1))
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    rest = [p for p in reference.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.1, weight_decay=0.1)
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(5):
        optimizer.backward(model(images).square().mean())
        optimizer.step(step, 100)
        reference(images).square().mean().backward()
        adamw.step()
        adamw.zero_grad()
    for own, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(own, theirs, rtol=1e-9, atol=1e-12)


def test_clipping_bounds_the_norm_of_all_gradients_together_and_reports_it_from_before():
    model, seen = nn.Linear(3, 1, bias=False), []
    optimizer = Optimizer([model], config(clip_norm=1.0))
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
    optimizer.backward((model.weight * torch.tensor([[3.0, 0.0, 4.0]])).sum())
    norm, made = optimizer.step(0, 10)
    assert norm.item() == pytest.approx(5) and made
    assert seen[0].flatten().tolist() == pytest.approx([0.6, 0, 0.8], abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(bad):
    model = network()
    optimizer = Optimizer([model], config(clip_norm=1.0))
    train(model, optimizer, range(2))
    before = weights(model)
    moments = [value.clone() for state in optimizer.adamw.state.values() for value in state.values()]
    optimizer.backward(model(torch.ones(1, 4, 8, 8)).mean() * bad)
    norm, made = optimizer.step(2, 100)
    assert not made and not torch.isfinite(norm)
    assert equal(weights(model), before)
    assert equal([value for state in optimizer.adamw.state.values() for value in state.values()], moments)
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
    assert not fp16.step(3, 100)[1]
    assert fp16.scaler.get_scale() == scale / 2 and equal(weights(scaled), before)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_optimizer_saved_and_taken_up_goes_on_bit_for_bit_in_any_memory_format(memory_format, fp16, tmp_path):
    """Fused AdamW walks raw memory, so moments that come back with other strides would meet other weights."""
    whole, broken = network(memory_format), network(memory_format)
    uninterrupted, before = Optimizer([whole], config(), fp16), Optimizer([broken], config(), fp16)
    train(whole, uninterrupted, range(5))
    train(broken, before, range(2))
    save_state(tmp_path, before.state_dict())
    after = Optimizer([broken], config(), fp16)
    after.load_state_dict(load_state(tmp_path))
    train(broken, after, range(2, 5))
    assert equal(weights(broken), weights(whole))
