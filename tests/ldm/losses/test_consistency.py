"""Claims about consistency functions and their distillation, against exact probability flows and diffusers."""

import diffusers
import pytest
import torch
from torch import nn

from ldm.denoising.denoiser import Denoiser
from ldm.denoising.prediction import PREDICTIONS, per_image, target
from ldm.guidance.classifier_free import classifier_free
from ldm.losses.consistency import (
    ConsistencyFunction,
    boundary,
    consistency_loss,
    distance,
    guidance_loss,
    guided_teacher,
    rung,
)
from ldm.samplers.onestep import ddim
from ldm.samplers.steps import NoiseLevel, ddim_step
from tests.helpers.proofs.oracles import GAUSSIAN, SCHEDULES, TWO, Mixture

POINT = Mixture((1.0,), (0.7,), (0.0,))
PREDICTION_TYPES = {"noise": "epsilon", "velocity": "v_prediction", "clean": "sample"}


def noise_levels(schedule, *times):
    """alpha and sigma [B] at each of some times [B]."""
    return [NoiseLevel(*schedule(t, torch.float64)) for t in times]


def levels(schedule, t):
    return (per_image(level, torch.empty(1, 1, 1, 1, dtype=torch.float64)) for level in schedule(t, torch.float64))


def teacher_of(data, schedule):
    """denoise(z_t, t [B]), exact."""

    def denoise(z_t, t):
        each = zip(z_t, *(level.tolist() for level in schedule(t, torch.float64)), strict=True)
        return torch.stack([data.denoise(z, alpha, sigma) for z, alpha, sigma in each])

    return denoise


def flow_of_gaussian(schedule, mean, std):
    """The consistency function of independent normal elements, in closed form, down to the first noise level."""

    def consistency(z_t, t, context):
        alpha, sigma = levels(schedule, t)
        end_alpha, end_sigma = schedule(1 / schedule.config.timesteps, torch.float64)
        kept = torch.hypot(end_alpha * std, end_sigma) / torch.hypot(alpha * std, sigma)
        return end_alpha * mean + kept * (z_t - alpha * mean)

    return consistency


def noised(data, schedule, t):
    """Latents [B, 2, 4, 4], float64, at times t [B]."""
    generator = torch.Generator().manual_seed(0)
    z_0 = data.sample(32 * len(t), generator).view(len(t), 2, 4, 4)
    alpha, sigma = levels(schedule, t)
    return alpha * z_0 + sigma * torch.randn(z_0.shape, generator=generator, dtype=torch.float64)


def loss_of(consistency, data, schedule, count, huber=0.0):
    """Mean loss over all times of a ladder."""
    t, s = rung(schedule, torch.arange(1, count + 1, dtype=torch.float64) / count, count)
    z_t = noised(data, schedule, t)
    return consistency_loss(consistency, consistency, teacher_of(data, schedule), z_t, t, s, None, schedule, huber)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_the_consistency_function_is_that_of_diffusers(prediction):
    schedule = SCHEDULES["scaled_linear"]
    kind = {"prediction_type": PREDICTION_TYPES[prediction], "clip_sample": False}
    scheduler = diffusers.LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, original_inference_steps=1000, **kind
    )
    scheduler.set_timesteps(1000)
    denoiser = Denoiser(
        lambda z, timestep, context: torch.tanh(z + timestep.view(-1, 1, 1, 1) / 500), schedule, prediction
    )
    z_t = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    for index in (999, 500, 20, 1, 0):
        output = denoiser.output(z_t, (index + 1) / 1000)
        scheduler._step_index = None
        expected = scheduler.step(output, index, z_t, torch.Generator().manual_seed(0)).denoised
        found = ConsistencyFunction(denoiser)(z_t, (index + 1) / 1000)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_at_the_first_noise_level_it_returns_its_input_and_from_the_second_on_the_denoisers_answer(name):
    schedule = SCHEDULES[name]
    first, second = (1 / schedule.config.timesteps, 0.01)
    c_skip, c_out = boundary(schedule, torch.tensor([0.0, first, second, 1.0], dtype=torch.float64))
    assert c_skip[0] == 1 and c_out[0] == 0
    assert c_skip[1] > (0.001 if schedule.discrete else 0) and (c_skip[1] == 1 or not schedule.discrete)
    assert (c_skip[2:] < 0.01).all() and (c_out[2:] > 0.99).all()


@pytest.mark.parametrize("prediction", ["clean", "velocity", "edm"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_is_zero_at_the_exact_solution_and_positive_elsewhere(name, prediction):
    """Of data that are one point the flow is straight in z_0 and noise, and a step of ddim is exact."""
    schedule = SCHEDULES[name]

    def network(z_in, timestep, context):
        return outputs.pop(0)

    t, s = rung(schedule, torch.linspace(0.1, 1, 8, dtype=torch.float64), 10)
    z_t, outputs = noised(POINT, schedule, t), []
    denoiser = Denoiser(network, schedule, prediction)
    z_0 = torch.full_like(z_t, 0.7)
    z_s = ddim_step(z_t, z_0, *noise_levels(schedule, t, s))

    def answers(shift):
        """What a network of that prediction says at z_s and at z_t where z_0 is `shift` more."""
        for z, time in ((z_s, s), (z_t, t)):
            alpha, sigma = levels(schedule, time)
            a, b, _ = denoiser.levels(time)
            yield target(z_0 + shift, (z - alpha * (z_0 + shift)) / sigma, a, b, prediction)

    def loss(shift):
        outputs[:] = answers(shift)
        condition = t, s, None, schedule
        return consistency_loss(denoiser, denoiser, teacher_of(POINT, schedule), z_t, *condition, huber=0.0)

    assert loss(0.0).max() < 1e-18
    outputs[:] = [answer for answer, _ in zip([next(answers(0.0)), [*answers(0.1)][1]], range(2), strict=True)]
    wrong = consistency_loss(denoiser, denoiser, teacher_of(POINT, schedule), z_t, t, s, None, schedule, huber=0.0)
    torch.testing.assert_close(wrong, torch.full_like(wrong, 0.01))


@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal", "cosine", "ve", "edm", "flow"])
def test_the_loss_at_the_flow_of_a_gaussian_falls_as_fast_as_steps_of_ddim_become_exact(name):
    """Local errors of a first-order solver fall with the square of a step, their squares with its fourth power."""
    schedule = SCHEDULES[name]
    exact = flow_of_gaussian(schedule, 0.7, 0.4)
    few, many = (loss_of(exact, GAUSSIAN, schedule, count).mean() for count in (25, 100))
    assert many < few / 40

    def mean_of_data(z_t, t, context):
        return teacher_of(GAUSSIAN, schedule)(z_t, t)

    assert loss_of(mean_of_data, GAUSSIAN, schedule, 100).mean() > 5 * many


def test_a_step_of_ddim_is_that_of_the_sampler_with_a_time_for_each_image():
    schedule, denoise = SCHEDULES["zero_terminal"], teacher_of(TWO, SCHEDULES["zero_terminal"])
    t, s = torch.tensor([1.0, 0.6, 0.02], dtype=torch.float64), torch.tensor([0.98, 0.4, 0.001], dtype=torch.float64)
    z_t = noised(TWO, schedule, t)
    found = ddim_step(z_t, denoise(z_t, t), *noise_levels(schedule, t, s))
    for i in range(3):
        walk, one = torch.stack([t[i], s[i]]), z_t[i : i + 1]
        (step,) = ddim(lambda z, time: denoise(z, torch.tensor([time])), one, walk, schedule, [])
        torch.testing.assert_close(found[i : i + 1], step.z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_rungs_are_the_times_of_the_authors(dtype):
    """Indices 19, 39, ..., 999, and from each 20 down, the last one to 0; every level belongs to the rung above."""
    schedule = SCHEDULES["scaled_linear"]
    t, s = rung(schedule, (torch.arange(1000) + 1).to(dtype) / 1000, 50)
    index = (schedule.timestep(t).round().long(), schedule.timestep(s).round().long())
    assert index[0].tolist() == [20 * (i // 20) + 19 for i in range(1000)]
    assert index[1].tolist() == [max(20 * (i // 20) - 1, 0) for i in range(1000)]


def test_the_teacher_guides_each_image_at_its_own_scale():
    denoiser = Denoiser(
        lambda z, timestep, context: z * context.tokens.mean((1, 2)).view(-1, 1, 1, 1), SCHEDULES["flow"], "flow"
    )
    condition, null = context_of(3), context_of(1, -1.0)
    z_t, t, scales = torch.randn(3, 2, 4, 4), torch.tensor([0.3, 0.6, 1.0]), torch.tensor([1.0, 4.0, 7.5])
    found = guided_teacher(denoiser, condition, null, scales)(z_t, t)
    for i, scale in enumerate(scales.tolist()):
        one = classifier_free(denoiser, condition.select(i), null, scale)
        torch.testing.assert_close(found[i : i + 1], one(z_t[i : i + 1], t[i : i + 1]))


def context_of(batch, shift=0.0):
    from conditioning.interface.context import Context

    return Context(tokens=shift + torch.arange(batch, dtype=torch.float32).view(-1, 1, 1) * torch.ones(1, 2, 3))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_learned_as_the_error_of_the_networks_output(prediction):
    schedule = SCHEDULES["scaled_linear"]
    outputs = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    student, teacher = (Denoiser(lambda *_, out=out: out, schedule, prediction) for out in outputs)
    z_t, t = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0.02, 0.5, 1.0], dtype=torch.float64)
    found = guidance_loss(student, lambda z_t, t: teacher(z_t, t), z_t, t, None)
    torch.testing.assert_close(found, (outputs[0] - outputs[1]).square().flatten(1).mean(1))
    assert guidance_loss(student, lambda z_t, t: student(z_t, t), z_t, t, None).max() == 0


def test_the_huber_distance_is_squared_for_small_errors_and_absolute_for_large_ones():
    errors = torch.tensor([[1e-4], [10.0]], dtype=torch.float64)
    small, large = distance(errors, torch.zeros_like(errors), 0.1)
    assert small == pytest.approx(1e-8 / 0.2, rel=1e-3) and large == pytest.approx(9.9, rel=1e-3)
    assert distance(errors, torch.zeros_like(errors), 0.0).tolist() == pytest.approx([1e-8, 100.0])


class Toy(nn.Module):
    """A network of one number and its time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, z_in, timestep, context=None):
        time = (timestep / 1000).view(-1, 1)
        x = torch.cat([z_in.flatten(1), time, time.square()], 1)
        return self.layers(x).view_as(z_in)


def test_a_distilled_mixture_reaches_the_end_of_its_flow_in_one_step():
    """The mean of z_0, which is what the teacher says at once, is many times further from where the flow ends."""
    torch.manual_seed(0)
    schedule, network = SCHEDULES["flow"], Toy()
    student, generator = ConsistencyFunction(Denoiser(network, schedule, "flow")), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)

    def teacher(z_t, t):
        alpha, sigma = (level[:, None] for level in schedule(t, torch.float64))
        return TWO.denoise(z_t.flatten(1), alpha[..., None], sigma[..., None]).view_as(z_t)

    for _ in range(800):
        t, s = rung(schedule, torch.rand(256, generator=generator), 20)
        z_0, noise = TWO.sample(256, generator).float(), torch.randn(256, generator=generator)
        z_t = student.denoiser.add_noise(z_0.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1), t)
        loss = consistency_loss(student, student, teacher, z_t, t, s, None, schedule, huber=0.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)
    expected = TWO.flow(z, (0.0, 1.0), (1.0, 0.0))
    with torch.no_grad():
        found = student(z.float().view(-1, 1, 1, 1), 1.0).flatten()
    at_once = TWO.denoise(z, 0.0, 1.0)
    error, before = ((each - expected).square().mean().sqrt().item() for each in (found, at_once))
    assert error < 0.12 and before > 0.8
