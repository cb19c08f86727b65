"""Means over a step of the polynomial through values at several places, which multistep samplers are made of.

Zhang & Chen 2022 (arXiv:2204.13902), section 3.2: multistep samplers differ in the place (sigma / alpha or its
logarithm), in the interpolated value (z_0 or noise), and in the weight along the step, which the moments describe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

MIDDLE = (1.0, 1 / 2)  # moments of the middle of a step: exact for lines, accurate for short steps
FEW = 15  # in fewer steps the last ones are of lower order: long extrapolation at low noise does harm (Lu et al. 2022b)


def usable(past: Sequence[object], index: int, steps: int) -> int:
    """How many of the past places a step uses: all, or fewer towards the end if there are few steps."""
    return min(len(past), steps - index) if steps < FEW else len(past)


def moments(rate: float, count: int) -> list[float]:
    """Means of x^0, x^1, ..., x^(count - 1) where x in [0, 1] weighs e^(rate x); at rate 0 they are 1, 1/2, 1/3, ..."""
    if abs(rate) < 1:  # where the recursion below loses digits
        terms = [rate**n / math.factorial(n) for n in range(20)]
        powers = [sum(term / (n + k + 1) for n, term in enumerate(terms)) for k in range(count)]
        return [power / powers[0] for power in powers]
    means = [1.0]
    for k in range(1, count):
        means.append(-1 / math.expm1(-rate) - k / rate * means[-1])  # integration by parts
    return means


def weights(places: Sequence[float], means: Sequence[float]) -> list[float]:
    """Weights of values at `places` in the mean of the polynomial through them, from the means of 1, x, x^2, ..."""
    result = []
    for i, place in enumerate(places):
        polynomial = [1.0]  # 1 at this place, 0 at the others; its coefficients, lowest first
        for other in (*places[:i], *places[i + 1 :]):
            shifted, scaled = [0.0, *polynomial], [*(other * number for number in polynomial), 0.0]
            polynomial = [(a - b) / (place - other) for a, b in zip(shifted, scaled, strict=True)]
        result.append(sum(number * mean for number, mean in zip(polynomial, means, strict=True)))
    return result


def mean_between(points: Sequence[tuple[float, Tensor]], start: float, end: float, means: Sequence[float]) -> Tensor:
    """The mean from `start` to `end` of the polynomial through `points`.

    Args:
        points: different places and their values, the newest first.
        start, end: of the step, x = 0 and x = 1 of the moments.
        means: one moment per point.

    Returns:
        The mean; the newest value if the step is of length 0 or infinite. Points at infinity are ignored.
    """
    if start == end or not math.isfinite(end - start):
        return points[0][1]
    points = [(place, value) for place, value in points if math.isfinite(place)]
    places = [(place - start) / (end - start) for place, _ in points]
    result = weights(places, means[: len(points)])
    return sum(weight * value for weight, (_, value) in zip(result, points, strict=True))
