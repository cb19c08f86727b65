"""ldm/denoising/prediction.py: many predictions, one meaning."""

import pytest
import torch

from ldm.denoising.prediction import PREDICTIONS, clean_coefficients, mix, target, to_clean

LEVELS = {"preserving": (0.6, 0.8), "exploding": (1.0, 7.0), "flow": (0.3, 0.7), "any": (0.9, 1.7)}


def draw(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_to_clean_inverts_target(prediction, levels, dtype, accuracy):
    z_0, noise = draw(dtype)
    alpha, sigma = (torch.tensor(level, dtype=torch.float64) for level in LEVELS[levels])
    output = target(z_0, noise, alpha, sigma, prediction)
    z_t = mix(z_0, noise, alpha, sigma)
    assert output.dtype == dtype
    torch.testing.assert_close(to_clean(output, z_t, alpha, sigma, prediction), z_0, rtol=0, atol=accuracy)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_levels_may_differ_between_images(prediction):
    z_0, noise = draw(torch.float64)
    alpha = torch.tensor([1.0, 0.9, 0.5, 0.1, 0.01], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    output = target(z_0, noise, alpha, sigma, prediction).nan_to_num(posinf=1.0, neginf=1.0)  # scores without noise
    z_t = mix(z_0, noise, alpha, sigma)
    together = to_clean(output, z_t, alpha, sigma, prediction)
    torch.testing.assert_close(together, z_0, rtol=0, atol=1e-12)
    for i in range(5):
        alone = to_clean(output[i : i + 1], z_t[i : i + 1], alpha[i], sigma[i], prediction)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=0)


def test_targets_are_those_of_the_papers():
    z_0, noise = draw(torch.float64)
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
    assert torch.equal(target(z_0, noise, alpha, sigma, "noise"), noise)
    assert torch.equal(target(z_0, noise, alpha, sigma, "clean"), z_0)
    torch.testing.assert_close(target(z_0, noise, alpha, sigma, "velocity"), alpha * noise - sigma * z_0)
    assert torch.equal(target(z_0, noise, alpha, sigma, "flow"), noise - z_0)
    torch.testing.assert_close(target(z_0, noise, alpha, sigma, "score"), -noise / sigma)


def test_score_is_the_gradient_of_the_log_density_around_one_z_0():
    z_0, noise = draw(torch.float64)
    alpha, sigma = (torch.tensor(level, dtype=torch.float64) for level in LEVELS["any"])
    z_t = mix(z_0, noise, alpha, sigma).requires_grad_()
    torch.distributions.Normal(alpha * z_0, sigma).log_prob(z_t).sum().backward()
    torch.testing.assert_close(target(z_0, noise, alpha, sigma, "score"), z_t.grad)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 1.0, 80.0])
def test_edm_is_the_preconditioning_of_its_paper(sigma):
    """Karras et al. 2022, table 1 with sigma_data = 1."""
    z_0, noise = draw(torch.float64)
    one, level = torch.tensor(1.0, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    c_skip, c_out = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1) ** 0.5
    z_t, output = z_0 + sigma * noise, torch.tanh(noise)
    torch.testing.assert_close(to_clean(output, z_t, one, level, "edm"), c_skip * z_t + c_out * output)
    torch.testing.assert_close(
        target(z_0, noise, one, level, "edm"), (z_0 - c_skip * z_t) / c_out, rtol=1e-8, atol=1e-8
    )


def test_edm_is_negative_velocity_where_variance_is_preserved():
    z_0, noise = draw(torch.float64)
    alpha, sigma = (torch.tensor(level, dtype=torch.float64) for level in LEVELS["preserving"])
    velocity = target(z_0, noise, alpha, sigma, "velocity")
    torch.testing.assert_close(target(z_0, noise, alpha, sigma, "edm"), -velocity)


@pytest.mark.parametrize("levels", LEVELS)
def test_edm_asks_for_unit_variance_whatever_the_levels(levels):
    z_0, noise = torch.randn(2, 100, 10_000, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (torch.tensor(level) for level in LEVELS[levels])
    assert target(z_0, noise, alpha, sigma, "edm").var().item() == pytest.approx(1, abs=0.01)
    correlation = (target(z_0, noise, alpha, sigma, "edm") * mix(z_0, noise, alpha, sigma)).mean()
    assert abs(correlation) < 0.01 * (alpha + sigma)  # z_t alone says nothing about it


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_noise_the_input_is_the_answer(prediction):
    z_0, output = draw(torch.float64)
    assert torch.equal(to_clean(output, z_0, torch.tensor(1.0), torch.tensor(0.0), prediction), z_0)


@pytest.mark.parametrize("prediction", ["clean", "velocity", "flow", "edm"])
def test_without_signal_the_network_alone_answers(prediction):
    z_0, noise = draw(torch.float64)
    zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    output = target(z_0, noise, zero, one, prediction)
    torch.testing.assert_close(to_clean(output, noise, zero, one, prediction), z_0)


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_noise_and_score_without_signal_raise_with_the_reason(prediction):
    z_0, noise = draw(torch.float32)
    alpha = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.5])
    with pytest.raises(ValueError, match=f"{prediction} prediction does not determine z_0 where alpha is 0"):
        to_clean(noise, noise, alpha, (1 - alpha**2).sqrt(), prediction)


def test_coefficients_are_those_of_the_one_formula():
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    expected = {
        "noise": (1 / 0.6, -0.8 / 0.6),
        "clean": (0, 1),
        "velocity": (0.6, -0.8),
        "flow": (1 / 1.4, -0.8 / 1.4),
        "score": (1 / 0.6, 0.8**2 / 0.6),
        "edm": (0.6, 0.8),
    }
    assert expected.keys() == PREDICTIONS.keys()
    for prediction, numbers in expected.items():
        assert [c.item() for c in clean_coefficients(alpha, sigma, prediction)] == pytest.approx(numbers, abs=1e-15)


def test_half_precision_outputs_do_not_lower_the_precision_of_latents():
    z_0, noise = draw(torch.float32)
    clean = to_clean(noise.bfloat16(), z_0, torch.tensor(0.6), torch.tensor(0.8), "velocity")
    assert clean.dtype == torch.float32


def test_an_unknown_prediction_is_refused_with_the_list_of_predictions():
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'; use one of noise, clean, velocity, flow"):
        target(*draw(torch.float32), torch.tensor(0.6), torch.tensor(0.8), "epsilon")
