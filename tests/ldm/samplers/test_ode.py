"""ldm/samplers/runge_kutta.py against equations with known solutions."""

import math

import pytest
import torch

from ldm.samplers.runge_kutta import DIFFERENCES, NODES, WEIGHTS, adaptive


def solved(slope, y, start, stop, tolerance):
    """y at the end, and how often the slope was asked for."""
    calls = []
    *_, (x, end) = adaptive(lambda x, y: calls.append(x) or slope(x, y), y, start, stop, tolerance)
    assert x == stop
    return end, len(calls)


def error_along(slope, y, solution, tolerance):
    """The largest error of a way from 0 to 3, relative to 1 + |y|, and how often the slope was asked for."""
    calls, errors = [], []
    for x, found in adaptive(lambda x, y: calls.append(x) or slope(x, y), y, 0.0, 3.0, tolerance):
        errors.append(((found - solution(x)).abs() / (1 + solution(x).abs())).max().item())
    return max(errors), len(calls)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


# slope, y at 0, solution
EQUATIONS = {
    "growth": (lambda x, y: y, numbers(1.0, -2.0), lambda x: numbers(1.0, -2.0) * math.exp(x)),
    "rotation": (
        lambda x, y: torch.stack([y[1], -y[0]]),
        numbers(0.0, 1.0),
        lambda x: numbers(math.sin(x), math.cos(x)),
    ),
    "logistic": (lambda x, y: y * (1 - y), numbers(0.2), lambda x: numbers(1 / (1 + 4 * math.exp(-x)))),
    "of x": (lambda x, y: -2 * x * y, numbers(1.5), lambda x: numbers(1.5 * math.exp(-x * x))),
}


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7, 1e-10])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_error_is_that_asked_for_within_a_factor(name, tolerance):
    error, calls = error_along(*EQUATIONS[name], tolerance)
    assert 0.02 < error / tolerance < 1.5
    assert calls < 130 * max(1, (1e-5 / tolerance) ** 0.2)


@pytest.mark.parametrize("name", EQUATIONS)
def test_it_is_of_order_5(name):
    """The error falls with the fifth power of the calls."""
    (error, calls), (smaller, more) = (error_along(*EQUATIONS[name], tolerance) for tolerance in (1e-9, 1e-12))
    assert math.log(error / smaller) / math.log(more / calls) == pytest.approx(5, abs=0.6)


@pytest.mark.parametrize("name", EQUATIONS)
def test_it_walks_backwards_and_comes_back(name):
    slope, y, solution = EQUATIONS[name]
    back, _ = solved(slope, solution(1.5), 1.5, 0.0, 1e-10)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("degree", range(6))
def test_it_is_exact_for_polynomials_up_to_degree_5(degree):
    end, _ = solved(lambda x, y: degree * x ** max(degree - 1, 0) * torch.ones_like(y), numbers(0.3), -1.0, 2.0, 1.0)
    expected = 0.3 + 2.0**degree - (-1.0) ** degree
    torch.testing.assert_close(end, numbers(expected), rtol=1e-13, atol=1e-13)


def test_the_table_fulfills_the_conditions_of_order_5_and_4():
    """Quadrature of x^k by both solutions, and sums of weights (Hairer et al. 1993, II.1)."""
    fifth = (*WEIGHTS[-1], 0.0)
    fourth = tuple(high - difference for high, difference in zip(fifth, DIFFERENCES, strict=True))
    for weights, order in ((fifth, 5), (fourth, 4)):
        for power in range(order):
            whole = sum(weight * node**power for weight, node in zip(weights, NODES, strict=True))
            assert whole == pytest.approx(1 / (power + 1), abs=1e-14)
    for node, weights in zip(NODES, WEIGHTS, strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-14)


def test_the_points_lie_in_order_and_each_step_begins_with_the_slope_that_ended_the_last():
    calls, found = [], []
    for x, y in adaptive(lambda x, y: calls.append((x, y)) or -y, numbers(1.0), 2.0, 0.0, 1e-4):
        assert calls[-1][0] == pytest.approx(x) and calls[-1][1] is y
        found.append(x)
    assert found == sorted(found, reverse=True) and found[-1] == 0.0
    assert len(calls) % 6 == 1


def test_a_row_that_needs_short_steps_gets_them_whatever_is_beside_it():
    hard = torch.tensor([[40.0]] + [[0.0]] * 99, dtype=torch.float64)
    end, _ = solved(lambda x, y: hard * math.cos(40 * x), torch.zeros(100, 1, dtype=torch.float64), 0.0, 1.0, 1e-6)
    assert end[0].item() == pytest.approx(math.sin(40), abs=1e-5)


def test_steps_are_short_where_the_slope_changes_fast_and_long_elsewhere():
    def peak(x, y):
        return torch.full_like(y, 1 / (1 + ((x - 0.5) / 0.01) ** 2))

    walked = [x for x, _ in adaptive(peak, numbers(0.0), 0.0, 1.0, 1e-7)]
    assert 0.3 < sum(abs(x - 0.5) < 0.03 for x in walked) / len(walked) < 0.9


def test_no_way_is_no_step():
    assert list(adaptive(lambda x, y: y, numbers(1.0), 0.5, 0.5, 1e-5)) == []


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, math.inf, math.nan])
def test_a_tolerance_that_is_none_is_named(tolerance):
    with pytest.raises(ValueError, match=f"^tolerance {tolerance} must be a positive number[^\n]*$"):
        next(adaptive(lambda x, y: y, numbers(1.0), 0.0, 1.0, tolerance))


@pytest.mark.parametrize("slope", [lambda x, y: y * math.nan, lambda x, y: y * y], ids=["NaN", "a pole"])
def test_a_tolerance_that_no_step_can_keep_is_refused(slope):
    """y' = y^2 has a pole at x = 1."""
    with pytest.raises(ValueError, match="^no step at x = .* is short enough for tolerance 1e-05; use a larger one$"):
        list(adaptive(slope, numbers(1.0), 0.0, 2.0, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    assert all(y.dtype == dtype for _, y in adaptive(lambda x, y: -y, torch.ones(2, 3, dtype=dtype), 0.0, 1.0, 1e-5))
