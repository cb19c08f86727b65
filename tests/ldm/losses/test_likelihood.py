"""The variational bound and the flow's likelihood, against exact densities, torch.distributions and each other."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ldm.likelihood.flow_likelihood import PROBES, ode_bits
from ldm.likelihood.variational_bound import (
    DECODERS,
    EIGHT_BIT_UNIT,
    VARIANCES,
    Bound,
    discretized,
    rate_distortion,
    variational_bound,
)
from ldm.samplers.onestep import ddpm
from ldm.samplers.spacing import times
from ldm.samplers.steps import noise_like
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from tests.helpers.proofs.oracles import GAUSSIAN, SCHEDULES, TWO, Mixture, denoiser_of

LOG_2 = math.log(2)
NARROW = Mixture((1.0,), (0.1,), (0.2,))  # within [-1, 1], so that values of 8 bits hold it


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def levels(schedule, t):
    return tuple(level.item() for level in schedule(t))


def entropy(std):
    """Of a normal distribution, in bits."""
    return math.log2(2 * math.pi * math.e * std**2) / 2


def quantiles(data, count):
    """One image [1, count] whose elements lie as a Gaussian's do, without the luck of a draw."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (data.means[0] + data.stds[0] * torch.special.ndtri(levels))[None]


def drawn(data, *shape):
    """Data, by another seed than those of noise: equal streams would make them one."""
    return data.sample(math.prod(shape), torch.Generator().manual_seed(10**6)).view(shape)


def log_density(data, z, alpha=1.0, sigma=0.0):
    """log p(alpha z_0 + sigma noise = z), elementwise."""
    weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (data.weights, data.means, data.stds))
    normal = Normal(alpha * means, (alpha**2 * stds**2 + sigma**2).sqrt())
    return (weights.log() + normal.log_prob(z[..., None])).logsumexp(-1)


def posterior_variance(data, alpha, sigma):
    """Of z_0 where z_t is known, for a Gaussian."""
    return 1 / (1 / data.stds[0] ** 2 + (alpha / sigma) ** 2)


def prior_of(schedule):
    """As the papers have it."""
    top = getattr(schedule.config, "sigma_max", 1.0) if schedule(1.0)[0] == 1 else 1.0
    return Normal(torch.zeros((), dtype=torch.float64), top)


def posterior(z_t, z_0, t, s, schedule):
    """q(z_s | z_t, z_0) by Bayes' rule, and the variance of q(z_t | z_s)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(schedule, t), levels(schedule, s)
    kept = alpha_t / alpha_s
    added = sigma_t**2 - kept**2 * sigma_s**2
    precision = 1 / sigma_s**2 + kept**2 / added
    mean = (alpha_s * z_0 / sigma_s**2 + kept * z_t / added) / precision
    return Normal(mean, precision**-0.5), added


def reverse(z_t, z_0, t, s, schedule, variance):
    """p(z_s | z_t) where the estimate is z_0."""
    normal, added = posterior(z_t, z_0, t, s, schedule)
    return Normal(normal.mean, added**0.5) if variance == "large" else normal


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_prior_costs_its_kl_divergence(name):
    schedule, z_0 = SCHEDULES[name], drawn(TWO, 3, 8)
    bound = variational_bound(denoiser_of(TWO, schedule), z_0, times(schedule, 2), schedule, seeds(3))
    alpha, sigma = levels(schedule, 1.0)
    expected = kl_divergence(Normal(alpha * z_0, sigma), prior_of(schedule)).mean(1) / LOG_2
    assert torch.allclose(bound.prior, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_step_costs_its_kl_divergence_and_the_last_its_density(name, variance):
    schedule, z_0, walked = SCHEDULES[name], drawn(TWO, 3, 8), times(SCHEDULES[name], 7)
    denoise = denoiser_of(TWO, schedule)
    bound = variational_bound(denoise, z_0, walked, schedule, seeds(3), variance)
    generators, walked = seeds(3), walked.tolist()
    for index, (t, s) in enumerate(zip(walked[:-1], walked[1:], strict=True)):
        alpha, sigma = levels(schedule, t)
        z_t = alpha * z_0 + sigma * noise_like(z_0, generators)
        estimate = denoise(z_t, t)
        assert torch.allclose(bound.errors[index], (estimate - z_0).square().mean(1))
        if s:
            q, _ = posterior(z_t, z_0, t, s, schedule)
            cost = kl_divergence(q, reverse(z_t, estimate, t, s, schedule, variance))
            assert torch.allclose(bound.terms[index], cost.mean(1) / LOG_2, rtol=1e-6)
        else:
            assert torch.allclose(bound.decoder, -Normal(estimate, sigma).log_prob(z_0).mean(1) / LOG_2)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["scaled_linear", "ve", "flow"])
def test_the_chain_that_is_bounded_is_the_one_that_ddpm_walks(name, variance):
    """Mean and deviation of 100,000 first steps from one point."""
    schedule, walked = SCHEDULES[name], times(SCHEDULES[name], 6)
    denoise, z_t = denoiser_of(TWO, schedule), torch.full((1, 100000), 0.3, dtype=torch.float64)
    step = next(ddpm(denoise, z_t, walked, schedule, seeds(1), variance=variance))
    expected = reverse(z_t, denoise(z_t, 1.0), 1.0, step.t, schedule, variance)
    scale = expected.stddev[0, 0].item()
    assert step.z.mean().item() == pytest.approx(expected.mean[0, 0].item(), abs=4 * scale / 100000**0.5)
    assert step.z.std().item() == pytest.approx(scale, rel=0.01)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "ve", "flow"])
def test_the_terms_sum_to_the_mean_of_the_logarithms_of_importance_weights(name, variance):
    """Whole chains drawn from q(z_1 ... z_T | z_0), log q - log p of each, by torch.distributions alone."""
    schedule, walked = SCHEDULES[name], times(SCHEDULES[name], 6)
    denoise, z_0 = denoiser_of(TWO, schedule), drawn(TWO, 200, 500)
    alpha, sigma = levels(schedule, 1.0)
    torch.manual_seed(2 * 10**6)
    first = Normal(alpha * z_0, sigma)
    z_t = first.sample()
    bits = (first.log_prob(z_t) - prior_of(schedule).log_prob(z_t)) / LOG_2
    for t, s in zip(walked[:-2].tolist(), walked[1:-1].tolist(), strict=True):
        q, _ = posterior(z_t, z_0, t, s, schedule)
        p = reverse(z_t, denoise(z_t, t), t, s, schedule, variance)
        z_t = q.sample()
        bits += (q.log_prob(z_t) - p.log_prob(z_t)) / LOG_2
    t = walked[-2].item()
    bits -= Normal(denoise(z_t, t), levels(schedule, t)[1]).log_prob(z_0) / LOG_2
    chains = bits.mean(1)
    bound = variational_bound(denoise, z_0, walked, schedule, seeds(200), variance).total
    margin = 4 * ((chains.var() + bound.var()) / 200).sqrt()
    assert abs(chains.mean() - bound.mean()) < margin < 0.05 * chains.mean().abs()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", ["scaled_linear", "ve", "flow"])
def test_each_term_of_a_gaussian_has_its_closed_form(name, variance):
    """The mean of a step's divergence is that of two normal variances and the posterior variance of z_0."""
    schedule, z_0, walked = SCHEDULES[name], quantiles(GAUSSIAN, 20000), times(SCHEDULES[name], 20)
    bound = variational_bound(denoiser_of(GAUSSIAN, schedule), z_0, walked, schedule, seeds(1), variance)
    for index, (t, s) in enumerate(zip(walked[:-2].tolist(), walked[1:-1].tolist(), strict=True)):
        spread = posterior_variance(GAUSSIAN, *levels(schedule, t))
        one = torch.ones((), dtype=torch.float64)
        q, _ = posterior(0 * one, 0 * one, t, s, schedule)
        p = reverse(0 * one, spread**0.5 * one, t, s, schedule, variance)
        assert bound.terms[index].item() == pytest.approx(kl_divergence(q, p).item() / LOG_2, rel=0.04, abs=1e-9)


def bound_of_a_gaussian(schedule, variance, count):
    """Bits per dimension with all levels of a schedule, less the luck of the draw at the first one, where most is."""
    z_0, walked = quantiles(GAUSSIAN, count), times(schedule, schedule.config.timesteps)
    bound = variational_bound(denoiser_of(GAUSSIAN, schedule), z_0, walked, schedule, seeds(1), variance)
    alpha, sigma = levels(schedule, walked[-2].item())
    luck = (bound.errors[-1] - posterior_variance(GAUSSIAN, alpha, sigma)) / (2 * sigma**2 * LOG_2)
    return (bound.total - luck).item()


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "zero_terminal", "flow"])
def test_the_bound_of_a_gaussian_is_its_entropy_within_one_percent(name):
    """With 1,000 levels and the large variance. The small one is off by up to 2 bits: the lowest levels are a factor of
    1.4 and more apart, and z_s is spread more than where z_0 is known."""
    exact = entropy(GAUSSIAN.stds[0])
    assert bound_of_a_gaussian(SCHEDULES[name], "large", 20000) == pytest.approx(exact, rel=0.01)
    assert bound_of_a_gaussian(SCHEDULES[name], "small", 1000) > 1.3 * exact


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_bound_of_exploding_variance_tightens_as_levels_are_added(variance):
    """Its levels are a constant factor apart, so what is lost falls with their number: 0.03 bits at 1,000."""
    lost = []
    for count in (500, 2000):
        schedule = make_schedule(ScheduleConfig(name="ve", timesteps=count))
        lost.append(bound_of_a_gaussian(schedule, variance, 5000) - entropy(GAUSSIAN.stds[0]))
    assert 0 < lost[1] < 0.04 and lost[0] > 3 * lost[1]


def test_the_probabilities_of_the_discretized_decoder_sum_to_one():
    values = torch.arange(256, dtype=torch.float64) / EIGHT_BIT_UNIT - 1
    for estimate in (-3.0, -1.0, -0.4, 0.0, 0.123, 0.999, 1.5):
        for sigma in (1e-3, 0.01, 0.1, 2.0):
            logs = discretized(values, torch.full_like(values, estimate), sigma)
            assert logs.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_discretized_decoder_is_the_difference_of_two_distribution_functions():
    values = torch.arange(1, 255, dtype=torch.float64) / EIGHT_BIT_UNIT - 1
    normal = Normal(torch.tensor(0.2, dtype=torch.float64), 0.3)
    expected = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    assert torch.allclose(discretized(values, torch.full_like(values, 0.2), 0.3).exp(), expected, rtol=1e-9)


def test_the_discretized_decoder_tells_improbable_values_apart():
    """In float32, 200 standard deviations away, on both sides alike."""
    values = torch.tensor([-1.0, -127 / 255, 127 / 255, 1.0])
    logs = discretized(values, -values, 0.01)
    assert logs.isfinite().all() and torch.allclose(logs, logs.flip(0)) and (logs < -1000).all()


def test_eight_bit_data_cost_their_entropy_by_both_routes():
    """Values rounded to the 256 of 8 bits have the entropy of the density, and 1 / 127.5 for their unit."""
    schedule = SCHEDULES["linear"]
    images = ((quantiles(NARROW, 10000) + 1) * EIGHT_BIT_UNIT).round() / EIGHT_BIT_UNIT - 1
    expected = entropy(NARROW.stds[0]) + math.log2(EIGHT_BIT_UNIT)
    denoise = denoiser_of(NARROW, schedule)
    bound = variational_bound(denoise, images, times(schedule, 1000), schedule, seeds(1), decoder="discretized")
    assert bound.total.item() == pytest.approx(expected, rel=0.01)
    assert ode_bits(denoise, images, schedule, seeds(1), eight_bit=True).item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_gives_a_gaussian_its_entropy_within_one_percent(name):
    schedule, z_0 = SCHEDULES[name], quantiles(GAUSSIAN, 5000)
    bits = ode_bits(denoiser_of(GAUSSIAN, schedule), z_0, schedule, seeds(1)).item()
    assert bits == pytest.approx(entropy(GAUSSIAN.stds[0]), rel=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_gives_each_sample_of_a_mixture_its_exact_density(name):
    """That of the prior where the sample's quantile ends up, times what the way there did to volume."""
    schedule, z_0 = SCHEDULES[name], torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    data, noise = levels(schedule, 1 / schedule.config.timesteps), levels(schedule, 1.0)
    end = TWO.flow(data[0] * z_0, data, noise)
    exact = prior_of(schedule).log_prob(end) + log_density(TWO, data[0] * z_0, *data) - log_density(TWO, end, *noise)
    exact = exact + math.log(data[0])
    bits = ode_bits(denoiser_of(TWO, schedule), z_0, schedule, seeds(41), tolerance=1e-7)
    assert torch.allclose(bits, -exact.squeeze(1) / LOG_2, atol=1e-5)


def test_the_flow_of_every_schedule_gives_the_same_likelihood():
    """Save for what they blur at their first level, and the signal that some of them leave at t = 1, both of which
    show in the tails."""
    z_0 = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    exact = -log_density(TWO, z_0).squeeze(1) / LOG_2
    for name, schedule in SCHEDULES.items():
        bits = ode_bits(denoiser_of(TWO, schedule), z_0, schedule, seeds(41))
        error, probability = bits - exact, (-exact * LOG_2).exp()
        assert error.abs().max() < 0.15 and error[10:31].abs().max() < 0.03, name
        assert abs((error * probability).sum() / probability.sum()) < 1e-3, name


COVARIANCE = torch.tensor([[0.5, 0.3, 0.1], [0.3, 0.4, -0.1], [0.1, -0.1, 0.3]], dtype=torch.float64)


def correlated(z_t, t, schedule=SCHEDULES["flow"]):
    """The denoiser of a Gaussian of three dimensions whose covariance is COVARIANCE."""
    alpha, sigma = levels(schedule, t)
    whole = alpha**2 * COVARIANCE + sigma**2 * torch.eye(3, dtype=torch.float64)
    return z_t @ (alpha * torch.linalg.solve(whole, COVARIANCE))


def test_exact_traces_give_the_density_of_correlated_data():
    schedule, z_0 = SCHEDULES["flow"], drawn(TWO, 5, 3)
    blurred = COVARIANCE + 1e-6 * torch.eye(3, dtype=torch.float64)
    expected = -MultivariateNormal(torch.zeros(3, dtype=torch.float64), blurred).log_prob(z_0) / 3 / LOG_2
    bits = ode_bits(correlated, z_0, schedule, seeds(5), probes="exact", tolerance=1e-7)
    assert torch.allclose(bits, expected, atol=1e-5)


@pytest.mark.parametrize("probes", PROBES)
def test_the_mean_over_probes_is_the_exact_trace(probes):
    """And four probes per image have a quarter of the variance of one."""
    schedule, z_0 = SCHEDULES["flow"], drawn(TWO, 1, 3)
    exact = ode_bits(correlated, z_0, schedule, seeds(1), probes="exact")
    variances = []
    for count in (1, 4):
        bits = ode_bits(correlated, z_0.expand(4000, 3), schedule, seeds(4000), probes=probes, count=count)
        assert abs(bits.mean() - exact) < 4 * bits.std() / 4000**0.5
        variances.append(bits.var().item())
    assert variances[0] > 1e-3
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.2)


def test_gaussian_probes_vary_where_rademacher_ones_are_exact():
    """A diagonal is read off by v_i^2 = 1; a normal v_i^2 is 1 only on average (Hutchinson 1989)."""
    schedule, z_0 = SCHEDULES["flow"], drawn(TWO, 1, 3).expand(200, 3)
    spread = {p: ode_bits(denoiser_of(TWO, schedule), z_0, schedule, seeds(200), p).std() for p in PROBES}
    assert spread["rademacher"] < 1e-6 and spread["gaussian"] > 0.1


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "ve", "flow"])
def test_the_distortion_of_the_optimal_denoiser_falls_as_rate_is_spent(name):
    schedule, walked = SCHEDULES[name], times(SCHEDULES[name], 40)
    bound = variational_bound(denoiser_of(TWO, schedule), drawn(TWO, 20, 2000), walked, schedule, seeds(20))
    curve = rate_distortion(bound)
    noisy = 0.02 * curve.distortion[0]  # where t is close to 1 nothing is known, and the draw decides
    assert (curve.distortion.diff() < noisy).all() and curve.distortion[-1] < 0.25 * curve.distortion[0]
    assert (curve.rate.diff() >= 0).all() and (curve.rate[0] == bound.prior.mean())
    assert torch.allclose(curve.rate + curve.remaining, bound.total.mean())
    assert torch.allclose(curve.remaining[-1], bound.decoder.mean())
    assert torch.equal(curve.times, walked[:-1])


def test_the_distortion_is_that_of_all_images_together():
    """The root of the mean of squares, not the mean of roots (Ho et al. 2020, section 4.3)."""
    bits, errors = torch.ones(2), torch.tensor([[1.0, 9.0], [0.0, 4.0]])
    bound = Bound(times=torch.tensor([1.0, 0.5]), prior=bits, terms=2 * bits[None], decoder=4 * bits, errors=errors)
    curve = rate_distortion(bound)
    assert torch.allclose(curve.distortion, torch.tensor([5.0, 2.0]).sqrt())
    assert curve.rate.tolist() == [1, 3] and curve.remaining.tolist() == [6, 4] and bound.total.tolist() == [7, 7]


def test_the_distortion_of_a_gaussian_is_its_posterior_standard_deviation():
    schedule, walked = SCHEDULES["cosine"], times(SCHEDULES["cosine"], 40)
    bound = variational_bound(denoiser_of(GAUSSIAN, schedule), drawn(GAUSSIAN, 20, 5000), walked, schedule, seeds(20))
    exact = [posterior_variance(GAUSSIAN, *levels(schedule, t)) ** 0.5 for t in walked[:-1].tolist()]
    exact = torch.tensor(exact, dtype=torch.float64)
    assert torch.allclose(rate_distortion(bound).distortion, exact, rtol=0.01)
    assert torch.allclose(rate_distortion(bound, EIGHT_BIT_UNIT).distortion, 127.5 * exact, rtol=0.01)


def test_an_image_costs_the_same_whatever_the_batch():
    schedule, z_0 = SCHEDULES["scaled_linear"], drawn(TWO, 4, 6)
    denoise = denoiser_of(TWO, schedule)
    for bits in (
        lambda z_0, generators: variational_bound(denoise, z_0, times(schedule, 9), schedule, generators).total,
        lambda z_0, generators: ode_bits(denoise, z_0, schedule, generators, "gaussian", tolerance=1e-7),
    ):
        assert torch.allclose(bits(z_0, seeds(4))[2:3], bits(z_0[2:3], seeds(1, first=2)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_data_of_any_precision_cost_about_the_same(dtype):
    schedule, z_0 = SCHEDULES["scaled_linear"], drawn(TWO, 2, 50).to(torch.bfloat16)
    denoise, walked = denoiser_of(TWO, schedule), times(schedule, 20)
    for bits in (
        lambda z_0: variational_bound(denoise, z_0, walked, schedule, seeds(2)).total,
        lambda z_0: ode_bits(denoise, z_0, schedule, seeds(2)),
    ):
        assert torch.allclose(bits(z_0.to(dtype)).double(), bits(z_0.double()), rtol=1e-3)


def test_callers_in_inference_mode_get_the_same_and_parameters_no_gradient():
    network, schedule = torch.nn.Linear(6, 6).double(), SCHEDULES["flow"]
    z_0 = drawn(TWO, 2, 6)
    expected = ode_bits(lambda z_t, t: network(z_t).tanh(), z_0, schedule, seeds(2))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            bits = ode_bits(lambda z_t, t: network(z_t).tanh(), z_0.clone(), schedule, seeds(2))
        assert torch.equal(bits, expected) and not bits.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_wrong_requests_are_one_line():
    schedule, z_0 = SCHEDULES["flow"], drawn(TWO, 2, 6)
    denoise, walked = denoiser_of(TWO, schedule), times(schedule, 4)

    def bound(z_0=z_0, walked=walked, generators=seeds(2), **options):
        return variational_bound(denoise, z_0, walked, schedule, generators, **options)

    def bits(z_0=z_0, generators=seeds(2), **options):
        return ode_bits(denoise, z_0, schedule, generators, **options)

    for request, message in (
        (lambda: bound(variance="medium"), r"'medium'.*small, large"),
        (lambda: bound(decoder="png"), r"'png'.*gaussian, discretized"),
        (lambda: bound(walked=walked[:-1]), r"end at 0.25.*append 0"),
        (lambda: bound(generators=seeds(3)), r"2 images.*not 3"),
        (lambda: bound(decoder="discretized"), r"off values of 8 bits"),
        (lambda: bound(2 * torch.ones(2, 6), decoder="discretized"), r"up to 128 of 255"),
        (lambda: bits(probes="uniform"), r"'uniform'.*rademacher, gaussian, exact"),
        (lambda: bits(count=0), r"count of probes 0.*at least 1"),
        (lambda: bits(generators=seeds(1)), r"2 images.*not 1"),
        (lambda: bits(eight_bit=True), r"off values of 8 bits"),
        (lambda: bits(tolerance=0.0), r"tolerance 0.0"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            request()
        assert "\n" not in str(raised.value)


def test_both_decoders_agree_where_bins_are_narrow():
    """The probability of a bin is the density times its width, where the density is nearly constant over it."""
    values = torch.arange(100, 150, dtype=torch.float64) / EIGHT_BIT_UNIT - 1
    estimate = torch.zeros_like(values)
    logs = {name: decoder(values, estimate, 0.5) for name, decoder in DECODERS.items()}
    assert torch.allclose(logs["discretized"], logs["gaussian"] - math.log(EIGHT_BIT_UNIT), atol=1e-4)
