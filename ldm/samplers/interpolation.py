"""Means over a step of the polynomial through what is known at several places: the heart of multistep samplers.

Zhang & Chen 2022 (arXiv:2204.13902), section 3.2: all of them differ in the place (sigma / alpha or its logarithm), in
what is interpolated (z_0 or noise) and in how the places along the step weigh, which is what the moments say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

MIDDLE = (1.0, 1 / 2)  # moments of a step that counts in its middle only: right for lines, good enough for short steps
FEW = 15  # in fewer steps the last ones are of lower order: long extrapolation at low noise does harm (Lu et al. 2022b)


def usable(past: Sequence[object], index: int, steps: int) -> int:
    """How many of the places that are known serve at a step: all, or fewer towards the end of a short walk."""
    return min(len(past), steps - index) if steps < FEW else len(past)


def moments(rate: float, count: int) -> list[float]:
    """Means of x^0, x^1, ..., x^(count - 1) where x in [0, 1] weighs e^(rate x); at rate 0 they are 1, 1/2, 1/3, ..."""
    if abs(rate) < 1:  # where the recursion below loses digits
        terms = [rate**n / math.factorial(n) for n in range(20)]
        powers = [sum(term / (n + k + 1) for n, term in enumerate(terms)) for k in range(count)]
        return [power / powers[0] for power in powers]
    found = [1.0]
    for k in range(1, count):
        found.append(-1 / math.expm1(-rate) - k / rate * found[-1])  # integration by parts
    return found


def weights(places: Sequence[float], means: Sequence[float]) -> list[float]:
    """What values at `places` weigh in the mean of the polynomial through them, given the means of 1, x, x^2, ..."""
    found = []
    for i, place in enumerate(places):
        polynomial = [1.0]  # 1 at this place, 0 at the others; its coefficients, lowest first
        for other in (*places[:i], *places[i + 1 :]):
            shifted, scaled = [0.0, *polynomial], [*(other * number for number in polynomial), 0.0]
            polynomial = [(a - b) / (place - other) for a, b in zip(shifted, scaled, strict=True)]
        found.append(sum(number * mean for number, mean in zip(polynomial, means, strict=True)))
    return found


def mean_between(known: Sequence[tuple[float, Tensor]], start: float, end: float, means: Sequence[float]) -> Tensor:
    """The mean from `start` to `end` of the polynomial through the `known` places and values.

    Args:
        known: places, none twice, and values; the newest first.
        start, end: where the step begins and ends, x = 0 and x = 1 of the moments.
        means: moments for as many powers as values are known.

    Returns:
        The newest value where the step has no length, or an infinite one; places at infinity say nothing.
    """
    if start == end or not math.isfinite(end - start):
        return known[0][1]
    known = [(place, value) for place, value in known if math.isfinite(place)]
    places = [(place - start) / (end - start) for place, _ in known]
    found = weights(places, means[: len(known)])
    return sum(weight * value for weight, (_, value) in zip(found, known, strict=True))
