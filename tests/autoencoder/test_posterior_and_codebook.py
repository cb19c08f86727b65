"""The posterior and the codebook."""

import math

import pytest
import torch

from autoencoder.networks.posterior import Posterior
from autoencoder.networks.vector_quantizer import VectorQuantizer, flatten, perplexity, revive, usage


def random_posterior(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Posterior.from_moments(torch.randn(shape, generator=g, dtype=torch.float64))


def test_kl_equals_that_of_torch_distributions_summed_per_sample():
    posterior = random_posterior(3, 8, 4, 5)
    normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert torch.allclose(posterior.kl().double(), expected, rtol=1e-5)


def test_kl_of_the_prior_is_zero():
    assert Posterior(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)).kl().tolist() == [0.0, 0.0]


def test_samples_have_the_posteriors_mean_and_variance():
    posterior = random_posterior(1, 4, 1, 1)
    noise = torch.randn(200_000, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = posterior.sample(noise)
    assert torch.allclose(samples.mean(dim=0), posterior.mean[0], atol=0.02)
    assert torch.allclose(samples.var(dim=0), posterior.variance[0], rtol=0.02)


def test_moments_round_trip():
    posterior = random_posterior(2, 6, 3, 3)
    again = Posterior.from_moments(posterior.moments)
    assert torch.equal(again.mean, posterior.mean) and torch.equal(again.logvar, posterior.logvar)


def test_log_variances_are_clamped_except_those_of_points():
    moments = torch.tensor([0.0, 0.0, 0.0, -100.0, 100.0, -math.inf]).reshape(1, 6, 1, 1)
    assert Posterior.from_moments(moments).logvar.flatten().tolist() == [-30.0, 20.0, -math.inf]


def test_a_sample_of_a_point_is_its_mode_exactly():
    mean = torch.randn(2, 4, 3, 3)
    posterior = Posterior(mean, torch.full_like(mean, -math.inf))
    assert torch.equal(posterior.sample(torch.randn_like(mean)), posterior.mode())


def test_affine_is_the_posterior_of_affine_latents():
    posterior, noise = random_posterior(2, 8, 3, 3), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.allclose(posterior.affine(0.7, 3.0).sample(noise), (posterior.sample(noise) - 0.7) * 3.0)


def codebook(size=32, channels=4, commitment=0.25):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(size, channels, commitment)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def test_each_latent_is_replaced_by_its_nearest_code(monkeypatch):
    quantizer, latents = codebook(), torch.randn(2, 4, 5, 6)
    expected = torch.cdist(flatten(latents), quantizer.embedding.weight).argmin(dim=1).reshape(2, 5, 6)
    assert torch.equal(quantizer(latents).indices, expected)
    monkeypatch.setattr("autoencoder.networks.vector_quantizer.CHUNK", 32 * 7)  # seven latents at a time
    assert torch.equal(quantizer(latents).indices, expected)


def test_codes_are_fixed_points():
    quantizer = codebook()
    indices = torch.arange(32).reshape(1, 4, 8)
    quantized = quantizer(quantizer.lookup(indices))
    assert torch.equal(quantized.indices, indices) and quantized.loss.item() == 0.0


def test_the_gradient_is_straight_through():
    quantizer, latents = codebook(), torch.randn(2, 4, 5, 6, requires_grad=True)
    weight = torch.randn(2, 4, 5, 6)
    (gradient,) = torch.autograd.grad((quantizer(latents).latents * weight).sum(), latents)
    assert torch.equal(gradient, weight)


def test_the_commitment_weight_multiplies_the_term_of_the_encoder():
    latents = torch.randn(2, 4, 5, 6, requires_grad=True)
    gradients = {}
    for beta in (0.25, 1.0):
        quantizer = codebook(commitment=beta)
        gradients[beta] = torch.autograd.grad(quantizer(latents).loss, (latents, quantizer.embedding.weight))
    assert torch.allclose(gradients[0.25][0], 0.25 * gradients[1.0][0])
    assert torch.allclose(gradients[0.25][1], gradients[1.0][1])


def test_revive_replaces_only_unused_codes_by_candidates():
    codes, candidates = torch.randn(8, 4), torch.randn(20, 4)
    before, counts = codes.clone(), torch.tensor([3, 0, 1, 0, 0, 7, 1, 2])
    assert len(revive(codes, counts, candidates, torch.Generator().manual_seed(0))) == 3
    assert torch.equal(codes[counts > 0], before[counts > 0])
    moved = codes[counts == 0]
    assert all((candidates == code).all(dim=1).any() for code in moved)
    assert len(moved.unique(dim=0)) == 3


def test_revive_depends_only_on_its_arguments():
    codes = torch.randn(8, 4)
    copies = [codes.clone(), codes.clone()]
    for i, copy in enumerate(copies):
        torch.manual_seed(i)
        revive(copy, torch.zeros(8), torch.arange(80.0).reshape(20, 4), torch.Generator().manual_seed(3))
    assert torch.equal(*copies)


def test_revive_replaces_as_many_codes_as_there_are_candidates():
    codes = torch.zeros(8, 4)
    assert len(revive(codes, torch.zeros(8), torch.ones(3, 4), torch.Generator())) == 3
    assert codes.sum().item() == 12.0


def test_usage_and_perplexity_of_known_counts():
    assert usage(torch.tensor([5, 0, 5, 0])) == 0.5
    assert perplexity(torch.tensor([5, 0, 5, 0])) == pytest.approx(2.0)
    assert perplexity(torch.full((64,), 3)) == pytest.approx(64.0)
    assert perplexity(torch.zeros(4)) == 0.0


def test_counts_add_up_to_the_latents():
    quantizer = codebook()
    counts = quantizer.counts(quantizer(torch.randn(2, 4, 5, 6)).indices)
    assert counts.shape == (32,) and counts.sum() == 60
