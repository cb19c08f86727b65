"""ldm/guidance/combines.py: APG, CFG-Zero* and CFG++ against their papers written out, and against each other."""

import math

import pytest
import torch

from conditioning.interface.context import Context
from ldm.denoising.denoiser import Denoiser
from ldm.guidance.classifier_free import classifier_free, extrapolate, in_interval, rescaled
from ldm.guidance.combines import apg, cfg_plus_plus, zero_output, zero_star
from ldm.samplers.heun import heun
from ldm.samplers.onestep import ddim
from ldm.samplers.spacing import TimeDefaults, times
from tests.helpers.proofs.oracles import SCHEDULES

CONTEXT = Context(vector=torch.tensor([[1.0], [2.0]], dtype=torch.float64))
NULL = Context(vector=torch.tensor([[0.3]], dtype=torch.float64))
SCALES = [-1.0, 0.5, 3.0, 12.0]


def network(z_in, timestep, context):
    return torch.tanh(z_in * context.vector[:, :, None, None] + context.vector[:, :, None, None] / 3)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(count):
    return [(random(2, 4, 3, 3, seed=i), random(2, 4, 3, 3, seed=100 + i)) for i in range(count)]


def guide(combine, condition, untold, scale):
    return combine(condition, untold, scale, condition, 0.5)


@pytest.mark.parametrize("scale", SCALES)
def test_apg_is_the_algorithm_of_its_paper(scale):
    """Sadat et al. 2024, algorithm 1, image by image."""
    momentum, norm, parallel = -0.5, 8.5, 0.3  # longer than some differences
    combine, running = apg(momentum, norm, parallel), [0.0, 0.0]
    for condition, untold in pairs(4):
        guided = guide(combine, condition, untold, scale)
        for i in range(2):
            running[i] = momentum * running[i] + (condition[i] - untold[i]).flatten()
            cut = running[i] * min(1.0, norm / running[i].norm().item())
            direction = condition[i].flatten() / condition[i].norm()
            line_step = cut.dot(direction) * direction
            expected = condition[i].flatten() + (scale - 1) * (cut - line_step + parallel * line_step)
            torch.testing.assert_close(guided[i].flatten(), expected)


@pytest.mark.parametrize("scale", SCALES)
def test_apg_without_its_three_changes_is_classifier_free(scale):
    combine = apg(momentum=0.0, parallel=1.0)
    for condition, untold in pairs(3):
        torch.testing.assert_close(guide(combine, condition, untold, scale), extrapolate(condition, untold, scale))


def test_what_apg_adds_is_orthogonal_to_the_conditional_estimate_and_of_bounded_length():
    (condition, untold), *_ = pairs(1)
    added = guide(apg(norm=2.0), condition, untold, 5.0) - condition
    assert (added * condition).flatten(1).sum(1).abs().max() < 1e-12
    assert (added.flatten(1).norm(dim=1) <= 4 * 2.0 + 1e-12).all()
    assert torch.equal(guide(apg(), condition, condition, 5.0), condition)


def test_a_new_apg_has_forgotten_the_run_before():
    first, second = pairs(2)
    used = apg()
    guide(used, *first, 5.0)
    assert torch.equal(guide(apg(), *second, 5.0), guide(apg(), *second, 5.0))
    assert not torch.equal(guide(used, *second, 5.0), guide(apg(), *second, 5.0))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prediction", ["noise", "velocity", "flow"])
def test_zero_star_scales_the_unconditional_output_to_fit_the_conditional_one_best(prediction, scale):
    """Fan et al. 2025, eq. 6-8; the scale is that of a least-squares fit, image by image."""
    schedule = SCHEDULES["flow_shift" if prediction == "flow" else "scaled_linear"]
    denoiser, z_t, t = Denoiser(network, schedule, prediction), random(2, 4, 3, 3), 0.6
    condition, untold = (denoiser.output(z_t, t, context) for context in (CONTEXT, NULL.repeat(2)))
    expected = torch.empty_like(condition)
    for i in range(2):
        fit = torch.linalg.lstsq(untold[i].reshape(-1, 1), condition[i].reshape(-1, 1)).solution.item()
        expected[i] = (1 - scale) * fit * untold[i] + scale * condition[i]
    guided = classifier_free(denoiser, CONTEXT, NULL, scale, zero_star(denoiser.coefficients))(z_t, t)
    first, second = denoiser.coefficients(t)
    torch.testing.assert_close(guided, first * z_t + second * expected)


def test_zero_star_is_classifier_free_where_the_fit_is_1_and_knows_no_scale_of_the_unconditional_output():
    clean = zero_star(lambda t: (torch.tensor(0.0), torch.tensor(1.0)))
    (condition, other), *_ = pairs(1)
    across = (
        other
        - (other * condition).flatten(1).sum(1).div(condition.square().flatten(1).sum(1))[:, None, None, None]
        * condition
    )
    for scale in SCALES:
        longer = condition + across  # whose projection on `condition` is 1
        torch.testing.assert_close(guide(clean, longer, condition, scale), extrapolate(longer, condition, scale))
        torch.testing.assert_close(guide(clean, condition, other, scale), guide(clean, condition, -7 * other, scale))
    assert torch.equal(guide(clean, condition, torch.zeros_like(condition), 3.0), 3 * condition)


def test_while_its_output_is_zero_a_flow_stands_and_no_network_is_called():
    schedule, calls = SCHEDULES["flow_shift"], []
    denoiser = Denoiser(lambda *condition: calls.append(1) or network(*condition), schedule, "flow")
    visited = times(schedule, 10)
    guided = classifier_free(denoiser, CONTEXT, NULL, 3.0, zero_star(denoiser.coefficients))
    denoise = in_interval(guided, zero_output(denoiser.coefficients), start=visited[3].item(), stop=0.0)
    z = random(2, 4, 3, 3)
    steps = list(ddim(denoise, z, visited, schedule, []))
    assert len(calls) == 7
    for step in steps[:3]:
        torch.testing.assert_close(step.z, z)
    assert not torch.allclose(steps[3].z, z)


@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "zero_terminal", "ve", "flow", "flow_shift"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0, -0.5])
def test_ddim_at_the_scales_of_cfg_plus_plus_is_its_algorithm(name, share):
    """Chung et al. 2024, algorithm 1: guided z_0, unconditional noise; the last step, to clean data, included."""
    schedule = SCHEDULES[name]
    denoiser = Denoiser(network, schedule, "velocity")
    visited = times(schedule, 7, "trailing")
    guided = classifier_free(denoiser, CONTEXT, NULL, cfg_plus_plus(share, visited, schedule))
    z = random(2, 4, 3, 3) * math.hypot(*schedule(1.0))
    steps = ddim(guided, z, visited, schedule, [])
    alphas, sigmas = (level.tolist() for level in schedule(visited))
    for i, step in enumerate(steps):
        condition, untold = (denoiser(z, visited[i].item(), context) for context in (CONTEXT, NULL.repeat(2)))
        noise = (z - alphas[i] * untold) / sigmas[i]
        z = alphas[i + 1] * (untold + share * (condition - untold)) + sigmas[i + 1] * noise
        torch.testing.assert_close(step.z, z, rtol=1e-9, atol=1e-9)


def test_the_scale_of_cfg_plus_plus_is_lambda_at_both_ends_and_one_number_in_each_step():
    schedule = SCHEDULES["flow"]
    scale = cfg_plus_plus(0.6, times(schedule, 4), schedule)  # 1, 0.75, 0.5, 0.25, 0
    assert scale(1.0) == scale(0.25) == scale(0.1) == scale(0.0) == 0.6
    assert scale(0.75) == pytest.approx(0.6 / (1 - 1 / 3))
    assert scale(0.6) == scale(0.75) == scale(torch.tensor(0.51)) > 0.6
    denoiser = Denoiser(network, schedule, "flow")
    *_, step = heun(
        classifier_free(denoiser, CONTEXT, NULL, scale), random(2, 4, 3, 3), times(schedule, 4), schedule, []
    )
    assert step.z.isfinite().all()


def test_a_walk_that_ends_where_it_is_has_a_finite_scale():
    schedule = SCHEDULES["scaled_linear"]
    visited = times(schedule, 5, "leading", TimeDefaults(ends_clean=False), offset=0)
    assert visited[-1] == visited[-2]
    assert cfg_plus_plus(0.6, visited, schedule)(visited[-2].item()) == 0.6


def test_any_way_to_combine_can_be_rescaled():
    denoiser, z_t = Denoiser(network, SCHEDULES["scaled_linear"], "clean"), random(2, 4, 3, 3)
    for inner in (apg, lambda: zero_star(denoiser.coefficients)):
        combine = rescaled(1.0, denoiser.coefficients, inner())
        guided = classifier_free(denoiser, CONTEXT, NULL, 9.0, combine)(z_t, 0.6)
        plain = classifier_free(denoiser, CONTEXT, NULL, 9.0, inner())(z_t, 0.6)
        expected_value = denoiser(z_t, 0.6, CONTEXT).std((1, 2, 3), keepdim=True)
        torch.testing.assert_close(guided, plain / plain.std((1, 2, 3), keepdim=True) * expected_value)


def test_wrong_options_raise_a_message_that_names_the_error():
    for options, words in (
        ({"momentum": 1.0}, "guidance momentum 1.0 must be between -1 and 1"),
        ({"momentum": math.nan}, "guidance momentum nan"),
        ({"norm": 0.0}, "guidance norm 0.0 must be a positive number"),
        ({"parallel": math.inf}, "guidance parallel inf must be a finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            apg(**options)
    with pytest.raises(ValueError, match="guidance scale nan must be a finite number"):
        cfg_plus_plus(math.nan, torch.tensor([1.0, 0.0]), SCHEDULES["flow"])
