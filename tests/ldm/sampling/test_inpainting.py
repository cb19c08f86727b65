"""Completion with a denoiser that was not trained for it: where blending is exact, and what repetitions improve."""

from functools import partial

import pytest
import torch

from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise
from ldm.sampling.known_latents import blended, painted_latents, resampled
from tests.helpers.proofs.moments import last, noise_of
from tests.helpers.proofs.oracles import SCHEDULES

SCHEDULE = SCHEDULES["scaled_linear"]
COUNT, KNOWN, STEPS = 8_000, 1.5, 200
KNOWN_LATENTS = torch.tensor([[[[KNOWN, 0.0]]]])  # the first of two is known
PAINTED = torch.tensor([[[[0.0, 1.0]]]])


def gaussian(correlation: float):
    """denoise(z_t [B, 1, 1, 2], t) -> E[z_0 | z_t], of two latents of variance 1 that are correlated."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])

    def denoise(z, t):
        alpha, sigma = (level.item() for level in SCHEDULE(t))
        return z @ (alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))).T

    return denoise


def completed(correlation: float, repeats: int, monkeypatch) -> torch.Tensor:
    """Samples [COUNT, 2] of ddpm, of which the first latent is known."""
    generator = torch.Generator().manual_seed(0)
    visited = times(SCHEDULE, STEPS)
    denoise = blended(gaussian(correlation), KNOWN_LATENTS, PAINTED)
    z = torch.randn(COUNT, 1, 1, 2, generator=generator)
    alpha, sigma = (level.item() for level in SCHEDULE(visited[0].item()))
    z[..., 0] = alpha * KNOWN + sigma * z[..., 0]
    with noise_of(lambda z: torch.randn(z.shape, generator=generator), monkeypatch):
        return last(resampled(SAMPLERS["ddpm"].run, denoise, z, visited, SCHEDULE, (), repeats)).z[:, 0, 0]


def test_what_is_known_ends_as_it_is_and_what_is_independent_of_it_has_its_own_distribution(monkeypatch):
    """The exact posterior where the two have nothing to do with each other."""
    known, made = completed(0.0, 1, monkeypatch).T
    assert (known - KNOWN).abs().max() < 1e-5
    assert made.mean().abs() < 0.04 and (made.std() - 1).abs() < 0.04


def test_repetitions_bring_what_is_made_nearer_to_the_exact_posterior(monkeypatch):
    """Mean rho k and variance 1 - rho^2; with blending alone the known part has influence too late."""
    correlation = 0.9
    mean, std = correlation * KNOWN, (1 - correlation**2) ** 0.5
    of_mean, of_std = [], []
    for repeats in (1, 3, 10):
        made = completed(correlation, repeats, monkeypatch)[:, 1]
        of_mean.append(abs(made.mean().item() - mean))
        of_std.append(abs(made.std().item() - std))
    assert of_mean[0] > 2 * of_mean[1] > 4 * of_mean[2]
    assert of_std[0] > 3 * max(of_std[1:])


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "heun", "dpm2", "lcm"])
def test_a_walk_in_segments_that_never_turns_back_is_the_whole_walk(name):
    denoise = gaussian(0.5)
    visited = times(SCHEDULE, 12)
    ends, indices = [], []
    for sample in (SAMPLERS[name].run, partial(resampled, SAMPLERS[name].run, repeats=1, segments=5)):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        z = initial_noise((2, 1, 1, 2), generators, SCHEDULE)
        steps = list(sample(denoise, z, visited, SCHEDULE, generators))
        ends.append(steps[-1].z)
        indices.append([step.index for step in steps])
    assert torch.equal(*ends)
    assert indices[0] == indices[1] == list(range(12))


def test_each_segment_is_walked_as_often_as_is_asked():
    asked = []

    def denoise(z, t):
        asked.append(round(t, 3))
        return z

    generators = [torch.Generator().manual_seed(0)]
    z = initial_noise((1, 1, 1, 2), generators, SCHEDULE)
    visited = times(SCHEDULE, 6)
    steps = list(resampled(SAMPLERS["euler"].run, denoise, z, visited, SCHEDULE, generators, 3, segments=3))
    first, second, third, *_ = (round(t, 3) for t in visited.tolist())
    assert asked[:7] == [first, second] * 3 + [third]
    assert len(steps) == 18


def test_a_latent_is_painted_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 8, 8)
    mask[0, 3, 4] = 1
    assert painted_latents(mask, 4).tolist() == [[[[0, 1], [0, 0]]]]
