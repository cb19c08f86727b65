"""Muon: orthogonalization compared with float64, the Gram form with the plain one, steps with torch's Muon."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stipple.training.optimization.muon import COEFFICIENTS, Muon, orthogonalize
from stipple.training.optimization.muon import _by_gram as by_gram
from stipple.training.optimization.muon import _plain as plain

SHAPES = [(64, 64), (64, 100), (64, 576), (576, 64), (16, 1152)]


def gradient(rows: int, columns: int) -> torch.Tensor:
    """A matrix of low rank with noise, like a gradient: singular values span three orders of magnitude."""
    draws = torch.Generator().manual_seed(rows + columns)
    low = torch.randn(rows, 8, generator=draws) @ torch.randn(8, columns, generator=draws)
    return low + 0.1 * torch.randn(rows, columns, generator=draws)


def reference(matrix: torch.Tensor) -> torch.Tensor:
    """Apply the polynomial five times to each singular value, in float64."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalizing_in_float32_agrees_with_float64(shape):
    matrix = gradient(*shape)
    assert difference(orthogonalize(matrix), reference(matrix)) < 1e-3
    assert orthogonalize(matrix).dtype == torch.float32


@pytest.mark.parametrize("shape", [(64, 128), (64, 576), (16, 1152)])
def test_the_gram_form_is_the_plain_iteration(shape):
    matrix = gradient(*shape)
    matrix = matrix / matrix.norm()
    assert difference(by_gram(matrix, 5), plain(matrix, 5)) < 1e-3
    assert difference(by_gram(matrix.double(), 5), plain(matrix.double(), 5)) < 1e-10


def test_a_zero_gradient_changes_nothing():
    weight = nn.Parameter(torch.ones(16, 64))
    weight.grad = torch.zeros(16, 64)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(16, 64))


def test_steps_and_state_equal_those_of_torch_muon_up_to_its_rounding():
    weight_here, weight_in_torch = (nn.Parameter(gradient(32, 288)) for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1}
    rules = (
        Muon([weight_here], **options),
        torch.optim.Muon([weight_in_torch], **options, adjust_lr_fn="match_rms_adamw"),
    )
    before = weight_here.detach().clone()
    for step in range(3):
        for weight, rule in zip((weight_here, weight_in_torch), rules, strict=True):
            weight.grad = gradient(32, 288 + step)[:, :288]
            rule.step()
    assert difference(weight_here - before, weight_in_torch - before) < 0.05  # torch's iterates in bfloat16
    state, other = (rule.state[weight] for rule, weight in zip(rules, (weight_here, weight_in_torch), strict=True))
    assert state.keys() == other.keys() and difference(state["momentum_buffer"], other["momentum_buffer"]) < 1e-6
