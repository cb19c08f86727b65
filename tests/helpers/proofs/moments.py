"""Stochastic samplers on known distributions: exact moments of their results, and tests with 100,000 samples."""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor

from ldm.samplers import langevin, onestep, stochastic
from ldm.samplers import steps as walk
from ldm.samplers.steps import initial_noise
from tests.helpers.proofs.oracles import TWO

COUNT = 100_000
DRAWS_PER_STEP = 4  # the highest number that `moments` supports
DRAWING = (langevin, onestep, stochastic, walk)  # modules that import noise_like


def last(steps):
    *_, step = steps
    return step


def by_ratio(schedule, highest: float, lowest: float, steps: int, clean: bool = True) -> Tensor:
    """Times at which sigma / alpha decrease as in Karras et al. 2022, for any schedule; with `clean`, also t = 0."""
    ratios = torch.linspace(highest ** (1 / 7), lowest ** (1 / 7), steps + (not clean), dtype=torch.float64) ** 7
    return torch.cat([schedule.time(ratios), torch.zeros(1 if clean else 0, dtype=torch.float64)])


@contextmanager
def noise_of(draw, patch):
    """Within the block, samplers draw noise by draw(like)."""
    with patch.context() as inside:
        for module in DRAWING:
            inside.setattr(module, "noise_like", lambda z, generators: draw(z))
        yield


def moments(run, denoise, schedule, times: Tensor, begun: float, spread: float, patch, **options):
    """Exact mean and variance of the last z, from a mean `begun` and variance `spread` of the first, for an affine
    denoiser.

    The last z is affine in the first z and in all draws. Row 0 starts at the mean without noise, row 1 one standard
    deviation higher, and row 2 + k draws 1 in the k-th draw. Their differences from row 0 are the coefficients.
    """
    drawn = 0

    def unit(z: Tensor) -> Tensor:
        nonlocal drawn
        noise = torch.zeros_like(z)
        noise[2 + drawn] = 1
        drawn += 1
        return noise

    z = torch.full((2 + DRAWS_PER_STEP * len(times), 1), begun, dtype=torch.float64)
    z[1] += math.sqrt(spread)
    with noise_of(unit, patch):
        end = last(run(denoise, z, times, schedule, None, **options)).z[:, 0]
    assert drawn > 0
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


def two(schedule):
    """`TWO.denoise` with half as many operations, for many float32 samples."""

    def denoise(z: Tensor, t: float) -> Tensor:
        alpha, sigma = (level.item() for level in schedule(t))
        variances = [(alpha * std) ** 2 + sigma**2 for std in TWO.stds]
        centers = [alpha * mean for mean in TWO.means]
        gains = [alpha * std**2 / variance for std, variance in zip(TWO.stds, variances, strict=True)]
        bases = [mean - gain * center for mean, gain, center in zip(TWO.means, gains, centers, strict=True)]
        odds = math.log(TWO.weights[0] / TWO.weights[1]) - math.log(variances[0] / variances[1]) / 2
        odds += centers[1] ** 2 / (2 * variances[1]) - centers[0] ** 2 / (2 * variances[0])
        slope = centers[0] / variances[0] - centers[1] / variances[1]
        first = torch.sigmoid(odds + z * (slope + (0.5 / variances[1] - 0.5 / variances[0]) * z))
        return bases[1] + gains[1] * z + first * (bases[0] - bases[1] + (gains[0] - gains[1]) * z)

    return denoise


def assert_draws_two(run, schedule, times: Tensor, denoise=None, **options) -> None:
    """Assert that 100,000 samples have mean, variance and weights of TWO, within five standard errors."""
    generators = [torch.Generator().manual_seed(1)]
    z = initial_noise((1, COUNT), generators, schedule, times[0].item())
    sampled = last(run(denoise or two(schedule), z, times, schedule, generators, **options)).z[0].double()
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (TWO.weights, TWO.means, TWO.stds))
    mean = (w * m).sum().item()
    off = m - mean
    variance = (w * (off**2 + s**2)).sum().item()
    fourth = (w * (off**4 + 6 * off**2 * s**2 + 3 * s**4)).sum().item()
    below = TWO.cdf(torch.zeros(1, dtype=torch.float64), 1.0, 0.0).item()
    errors = {  # in standard errors
        "mean": (sampled.mean().item() - mean) / math.sqrt(variance / COUNT),
        "variance": (sampled.var().item() - variance) / math.sqrt((fourth - variance**2) / COUNT),
        "weight": ((sampled < 0).double().mean().item() - below) / math.sqrt(below * (1 - below) / COUNT),
    }
    assert all(abs(error) < 5 for error in errors.values()), errors


MEAN, COVARIANCE = (0.5, -0.8), ((0.5, 0.35), (0.35, 0.4))


def correlated(schedule):
    """E[z_0 | z_t] [1, 2, N] for a two-dimensional Gaussian with MEAN and COVARIANCE."""
    mean, covariance = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, COVARIANCE))

    def denoise(z: Tensor, t: float) -> Tensor:
        alpha, sigma = (level.item() for level in schedule(t))
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        offset = mean - alpha * gain @ mean
        return gain.to(z) @ z + offset.to(z)[:, None]

    return denoise


def assert_draws_correlated(run, schedule, times: Tensor, **options) -> None:
    """Assert that 100,000 samples have MEAN and COVARIANCE, within five standard errors."""
    generators = [torch.Generator().manual_seed(2)]
    z = initial_noise((1, 2, COUNT), generators, schedule, times[0].item())
    sampled = last(run(correlated(schedule), z, times, schedule, generators, **options)).z[0].double()
    mean, covariance = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, COVARIANCE))
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance**2) / COUNT).sqrt()
    off = (sampled.mean(1) - mean) / (variances / COUNT).sqrt(), (sampled.cov() - covariance) / error
    assert all(part.abs().max() < 5 for part in off), off
