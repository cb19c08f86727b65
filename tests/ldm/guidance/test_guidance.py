"""ldm/guidance/classifier_free.py: the arithmetic of guidance, what it costs, and guided Gaussians in closed form."""

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler

from conditioning.interface.context import Context
from ldm.denoising.denoiser import Denoiser
from ldm.denoising.prediction import PREDICTIONS
from ldm.guidance.classifier_free import autoguidance, classifier_free, composed, extrapolate, in_interval, rescaled
from ldm.guidance.thresholding import thresholded
from ldm.samplers.heun import heun
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise
from tests.helpers.proofs.oracles import SCHEDULES


def means(values):
    """A context whose vector is the mean of the data that it stands for."""
    return Context(vector=torch.tensor(values, dtype=torch.float64)[:, None])


@dataclass
class Counting:
    """The exact denoiser of normal data with the mean that the context tells and a common standard deviation."""

    schedule: object
    std: float = 0.5
    sizes: list = None

    def __post_init__(self):
        self.sizes = []

    def __call__(self, z_t, t, context):
        self.sizes.append((len(z_t), context.vector[:, 0].tolist()))
        alpha, sigma = (level.reshape(-1, 1) for level in self.schedule(t))
        mean = context.vector
        return mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (z_t - alpha * mean)


@pytest.fixture
def z_t():
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


CONTEXT, NULL = means([1.0, 2.0, 3.0]), means([0.5])


def test_scale_1_is_the_conditional_denoiser_and_never_computes_the_unconditional_one(z_t):
    denoiser = Counting(SCHEDULES["flow"])
    guided = classifier_free(denoiser, CONTEXT, NULL, 1)(z_t, 0.4)
    assert denoiser.sizes == [(3, [1, 2, 3])]
    assert torch.equal(guided, denoiser(z_t, 0.4, CONTEXT))


def test_scale_1_needs_no_null_context(z_t):
    assert classifier_free(Counting(SCHEDULES["flow"]), CONTEXT, None, 1.0)(z_t, 0.4).shape == z_t.shape


def test_scale_0_is_the_unconditional_denoiser_and_never_computes_the_conditional_one(z_t):
    denoiser = Counting(SCHEDULES["flow"])
    guided = classifier_free(denoiser, CONTEXT, NULL, 0)(z_t, 0.4)
    assert denoiser.sizes == [(3, [0.5] * 3)]
    assert torch.equal(guided, denoiser(z_t, 0.4, NULL.repeat(3)))


@pytest.mark.parametrize("scale", [-2.0, -1.0, 0.5, 1.5, 7.5])
def test_every_other_scale_extrapolates_from_one_call_of_both(z_t, scale):
    denoiser = Counting(SCHEDULES["flow"])
    guided = classifier_free(denoiser, CONTEXT, NULL, scale)(z_t, 0.4)
    assert denoiser.sizes == [(6, [1, 2, 3, 0.5, 0.5, 0.5])]
    conditional, unconditional = denoiser(z_t, 0.4, CONTEXT), denoiser(z_t, 0.4, NULL.repeat(3))
    torch.testing.assert_close(guided, unconditional + scale * (conditional - unconditional))


@pytest.mark.parametrize("scale", [1e-9, 1 - 1e-9, 1 + 1e-9])
def test_guidance_is_continuous_where_it_saves_a_pass(z_t, scale):
    near, at = (classifier_free(Counting(SCHEDULES["flow"]), CONTEXT, NULL, s)(z_t, 0.4) for s in (scale, round(scale)))
    torch.testing.assert_close(near, at, rtol=0, atol=1e-7)


def test_times_may_differ_between_images(z_t):
    guided = classifier_free(Counting(SCHEDULES["flow"]), CONTEXT, NULL, 3.0)
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    for i, together in enumerate(guided(z_t, t)):
        one = classifier_free(Counting(SCHEDULES["flow"]), CONTEXT.select(i), NULL, 3.0)
        torch.testing.assert_close(one(z_t[i : i + 1], t[i].item())[0], together)


def test_one_context_serves_a_whole_batch_and_each_image_may_have_its_negative_prompt(z_t):
    denoiser = Counting(SCHEDULES["flow"])
    classifier_free(denoiser, means([2.0]), means([0.0, -1.0, -2.0]), 3.0)(z_t, 0.4)
    assert denoiser.sizes == [(6, [2, 2, 2, 0, -1, -2])]


def test_an_unconditional_denoiser_is_not_guided(z_t):
    assert torch.equal(classifier_free(lambda z, t, context: z, None, None, 1.0)(z_t, 0.4), z_t)


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "ve", "flow_shift"])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 3.0])
def test_guided_gaussians_have_the_mean_in_closed_form(name, scale):
    """Two Gaussians that differ in their mean alone: guidance is the denoiser of the Gaussian whose mean is
    m_null + scale (m - m_null). Its probability flow is exact from any beginning, so the mean is that of the result."""
    schedule, std = SCHEDULES[name], 0.5
    guided = classifier_free(Counting(schedule, std), means([1.5]), means([0.25]), scale)
    mean = 0.25 + scale * 1.25
    start = 0.9
    alpha, sigma = (level.item() for level in schedule(start))
    z = torch.linspace(-1, 1, 21, dtype=torch.float64)[None] * sigma + 0.2
    walk = torch.linspace(start, 0.05, 401, dtype=torch.float64)
    *_, last = heun(guided, z, walk, schedule, [])
    end_alpha, end_sigma = (level.item() for level in schedule(0.05))
    width = math.hypot(end_alpha * std, end_sigma) / math.hypot(alpha * std, sigma)
    exact = end_alpha * mean + width * (z - alpha * mean)
    torch.testing.assert_close(last.z, exact, rtol=0, atol=2e-3)
    assert last.z.mean().item() == pytest.approx(end_alpha * mean + width * (0.2 - alpha * mean), abs=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_z_0_is_guiding_the_output_for_every_prediction(z_t, prediction):
    """Ho & Salimans 2022 guide the network's output (noise); the estimate of z_0 is affine in it."""

    def network(z_in, timestep, context):
        return torch.tanh(z_in * context.vector)

    def guided_network(z_in, timestep, context):
        a, b = network(z_in, timestep, context), network(z_in, timestep, NULL.repeat(3))
        return extrapolate(a, b, 4.0)

    schedule, condition = SCHEDULES["scaled_linear"], CONTEXT
    one = classifier_free(Denoiser(network, schedule, prediction), condition, NULL, 4.0)(z_t, 0.6)
    torch.testing.assert_close(one, Denoiser(guided_network, schedule, prediction)(z_t, 0.6, condition))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["scaled_linear", "ve"])
@pytest.mark.parametrize("t", [0.6, torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)], ids=["one", "each"])
def test_rescaling_takes_back_the_contrast_of_each_image_in_the_output_of_the_network(z_t, prediction, name, t):
    """Lin et al. 2023, eq. 14-16, where the output is mixed, not z_0."""
    schedule = SCHEDULES[name]
    denoiser = Denoiser(lambda z_in, timestep, context: torch.tanh(z_in * context.vector), schedule, prediction)
    condition, without = (denoiser.output(z_t, t, context) for context in (CONTEXT, NULL.repeat(3)))
    guided = extrapolate(condition, without, 6.0)
    full = guided * condition.std(1, keepdim=True) / guided.std(1, keepdim=True)
    for factor in (0.0, 0.7, 1.0):
        output = factor * full + (1 - factor) * guided
        rescaling = rescaled(factor, denoiser.coefficients)
        expected = Denoiser(lambda *_: output, schedule, prediction)(z_t, t)  # noqa: B023
        torch.testing.assert_close(classifier_free(denoiser, CONTEXT, NULL, 6.0, rescaling)(z_t, t), expected)


def test_guidance_in_an_interval_costs_nothing_outside():
    schedule = SCHEDULES["flow"]
    denoiser = Counting(schedule)
    guided, plain = (classifier_free(denoiser, means([1.0]), means([0.0]), scale) for scale in (3.0, 1.0))
    denoise = in_interval(guided, plain, start=0.8, stop=0.3)
    z = initial_noise((1, 6), [torch.Generator().manual_seed(0)], schedule).double()
    for t in times(schedule, 10)[:-1].tolist():
        denoise(z, t)
    assert [size for size, _ in denoiser.sizes] == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match=f"guidance scale {scale} must be a finite number"):
        classifier_free(Counting(SCHEDULES["flow"]), CONTEXT, NULL, scale)


def test_wrong_options_raise_a_message_that_names_the_error():
    with pytest.raises(ValueError, match="guidance rescale 1.2 must be between 0"):
        rescaled(1.2, None)
    with pytest.raises(ValueError, match="guidance interval from t = 0.2 to 0.6"):
        in_interval(None, None, start=0.2, stop=0.6)


@dataclass
class Conditioned:
    """The exact denoiser of normal data whose mean and standard deviation are the context's vector."""

    schedule: object

    def __call__(self, z_t, t, context):
        mean, std = context.vector[:, :1], context.vector[:, 1:]
        alpha, sigma = (level.reshape(-1, 1) for level in self.schedule(t))
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z_t - alpha * mean)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", [-0.5, 0.5, 3.0, 8.0])
def test_guidance_of_two_gaussians_is_their_product_of_powers(name, scale):
    """p(z_t | context)^scale p(z_t)^(1 - scale) is a Gaussian with the precision P = scale / V_1 + (1 - scale) / V_0
    and the mean (scale M_1 / V_1 + (1 - scale) M_0 / V_0) / P, V = alpha^2 std^2 + sigma^2 and M = alpha mean. Its
    score is -P (z_t - mean), and by Tweedie's formula z_0 = (z_t + sigma^2 score) / alpha."""
    schedule, (m_1, std_1), (m_0, std_0) = SCHEDULES[name], (1.5, 0.4), (0.2, 0.9)
    contexts = (Context(vector=torch.tensor([pair], dtype=torch.float64)) for pair in ((m_1, std_1), (m_0, std_0)))
    guided = classifier_free(Conditioned(schedule), *contexts, scale)
    for t in (0.001, 0.1, 0.5, 0.9, 0.99):
        alpha, sigma = (level.item() for level in schedule(t))
        z_t = torch.linspace(-3, 3, 13, dtype=torch.float64)[None] * math.hypot(alpha, sigma)
        v_1, v_0 = ((alpha * std) ** 2 + sigma**2 for std in (std_1, std_0))
        precision = scale / v_1 + (1 - scale) / v_0
        mean = alpha * (scale * m_1 / v_1 + (1 - scale) * m_0 / v_0) / precision
        expected = (z_t - sigma**2 * precision * (z_t - mean)) / alpha
        torch.testing.assert_close(guided(z_t, t), expected, rtol=1e-9, atol=1e-9)


def test_a_scale_may_be_a_function_of_time_which_saves_the_same_passes(z_t):
    denoiser = Counting(SCHEDULES["flow"])
    scales = {0.9: 1.0, 0.5: 4.0, 0.1: 0.0}
    guided = classifier_free(denoiser, CONTEXT, NULL, scales.get)
    for t, scale in scales.items():
        assert torch.equal(guided(z_t, t), classifier_free(Counting(SCHEDULES["flow"]), CONTEXT, NULL, scale)(z_t, t))
    assert [size for size, _ in denoiser.sizes] == [3, 6, 3]
    with pytest.raises(ValueError, match="guidance scale nan must be a finite number"):
        classifier_free(denoiser, CONTEXT, NULL, lambda t: math.nan)(z_t, 0.4)


def test_guidance_in_an_interval_of_noise_levels_is_one_of_times():
    """Kynkaanniemi et al. 2024 specify intervals in sigma / alpha."""
    schedule = SCHEDULES["scaled_linear"]
    start, stop = schedule.time(5.42).item(), schedule.time(0.28).item()
    denoise = in_interval(lambda z, t: True, lambda z, t: False, start, stop)
    for t in (0.05, 0.2, 0.5, 0.85, 0.95):
        alpha, sigma = schedule(t)
        assert denoise(None, t) == (0.28 <= sigma / alpha <= 5.42)


def test_thresholds_that_nothing_passes_change_nothing(z_t):
    for percentile in (None, 99.5):
        assert torch.equal(thresholded(lambda z, t: z, 50.0, percentile)(z_t, 0.4), z_t)


def test_a_static_threshold_clips():
    z = torch.tensor([[-3.0, -0.5, 2.0, 0.25]])
    assert thresholded(lambda z, t: z, 1.0)(z, 0.4).tolist() == [[-1.0, -0.5, 1.0, 0.25]]


@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_a_dynamic_threshold_is_the_percentile_of_each_image(bound):
    """Saharia et al. 2022, section 2.3, with a bound of 1; an image within the bound stays as it is."""
    z = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z *= torch.tensor([0.2, 4.0, 9.0]).view(-1, 1, 1, 1)
    found = thresholded(lambda z, t: z, bound, 90.0)(z, 0.4)
    for image, result in zip(z, found, strict=True):
        s = max(bound, torch.quantile(image.abs(), 0.9).item())
        torch.testing.assert_close(result, image.clamp(-s, s) / s * bound)
    assert torch.equal(found[0], z[0])
    assert found.abs().max() <= bound
    both = thresholded(lambda z, t: z, 1.0, 90.0)(z.float(), 0.4)
    reference = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e9)
    torch.testing.assert_close(both, reference._threshold_sample(z.float()))


@pytest.mark.parametrize("scale", [-2.0, 0.0, 1.0, 0.5, 7.5])
def test_one_prompt_is_composed_to_classifier_free_guidance_to_the_last_bit(z_t, scale):
    denoiser = Counting(SCHEDULES["flow"])
    one = composed(denoiser, [CONTEXT], [scale], NULL)(z_t, 0.4)
    assert torch.equal(one, classifier_free(denoiser, CONTEXT, NULL, scale)(z_t, 0.4))
    assert denoiser.sizes[0] == denoiser.sizes[1]


def test_prompts_are_composed_from_one_call_without_those_that_weigh_nothing(z_t):
    """Liu et al. 2022, eq. 11; the weight below 0 is a negative prompt."""
    denoiser, others = Counting(SCHEDULES["flow"]), [means([2.0]), means([-1.0, 0.0, 4.0]), means([9.0])]
    found = composed(denoiser, [CONTEXT, *others], [3.0, 1.5, -0.5, 0.0], NULL)(z_t, 0.4)
    assert denoiser.sizes == [(12, [1, 2, 3, 2, 2, 2, -1, 0, 4, 0.5, 0.5, 0.5])]
    first, second, third, null = (
        denoiser(z_t, 0.4, condition.repeat(3) if len(condition.vector) == 1 else condition)
        for condition in (CONTEXT, *others[:2], NULL)
    )
    torch.testing.assert_close(found, null + 3 * (first - null) + 1.5 * (second - null) - 0.5 * (third - null))


def test_composed_gaussians_have_the_mean_of_both(z_t):
    """Where the weights add up to 1, null falls out of the sum, and is not computed."""
    denoiser = Counting(SCHEDULES["flow"])
    found = composed(denoiser, [means([1.0]), means([2.0])], [0.5, 0.5], None)(z_t, 0.4)
    assert denoiser.sizes == [(6, [1, 1, 1, 2, 2, 2])]
    torch.testing.assert_close(found, denoiser(z_t, 0.4, means([1.5]).repeat(3)))
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    expected = denoiser(z_t, t, means([0.5 + 2 * 0.5 + 3 * 1.5]).repeat(3))
    torch.testing.assert_close(composed(denoiser, [means([1.0]), means([2.0])], [2.0, 3.0], NULL)(z_t, t), expected)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 2.5])
def test_autoguidance_extrapolates_from_the_weaker_model_and_calls_what_it_needs(z_t, scale):
    called = []

    def strong(z, t):
        called.append("strong")
        return z.sin()

    def weak(z, t):
        called.append("weak")
        return z.cos()

    found = autoguidance(strong, weak, scale)(z_t, 0.4)
    torch.testing.assert_close(found, z_t.cos() + scale * (z_t.sin() - z_t.cos()))
    assert called == {0.0: ["weak"], 1.0: ["strong"]}.get(scale, ["strong", "weak"])
    torch.testing.assert_close(autoguidance(strong, strong, scale)(z_t, 0.4), z_t.sin())


def test_wrong_options_of_other_guidances_raise_a_message_that_names_the_error():
    for bound, percentile, words in (
        (0.0, None, "guidance bound 0.0 must be a positive number"),
        (math.nan, None, "guidance bound nan"),
        (1.0, 0.995, "guidance percentile 0.995 must be between 50 and 100; 99.5 is usual"),
    ):
        with pytest.raises(ValueError, match=words):
            thresholded(None, bound, percentile)
    with pytest.raises(ValueError, match="guidance scale nan must be a finite number"):
        composed(None, [CONTEXT], [math.nan], NULL)
    with pytest.raises(ValueError, match="2 contexts need as many weights, not 1"):
        composed(None, [CONTEXT, CONTEXT], [1.0], NULL)
    with pytest.raises(ValueError, match="guidance scale inf must be a finite number"):
        autoguidance(None, None, math.inf)
