"""Our samplers that draw noise take the steps of diffusers' schedulers, from the same network and the same noise.

What differs by definition, and by how much:

- DDPMScheduler with large or learned variance draws noise in its last step, too, unless that begins at the first noise
  level: beta from there to clean data, with 4 trailing steps noise of 0.57. Stipple's end clean; here diffusers' draws
  zeros.
- DPMSolverSDEScheduler correlates the noise of the middle with that of the whole step as a Brownian motion in sigma;
  Stipple's does so as the reverse process. Both have the right variance. Here diffusers' gets Stipple's.
- DPMSolverMultistepScheduler of order 3 weighs the bend of its parabola by (1 - e^-2h - 2h) / (2h)^2 - 1/2, which
  becomes -1 for short steps; the integral is twice (1 - e^-2h - 2h) / (2h)^2 + 1/2. Here diffusers' is corrected;
  otherwise the results of the network below differ by 10 to 33 % of their spread with 25 steps, and with 100 by no
  less.
- LCMScheduler's c_skip and c_out are part of a denoiser: here they wrap it.
- EulerDiscreteScheduler's churn asks the network before it adds the noise, Karras et al. 2022 after it;
  HeunDiscreteScheduler has none. Nothing to compare.
"""

import importlib
import math
import sys
import types

import diffusers
import pytest
import torch

from ldm.denoising.denoiser import Denoiser
from ldm.denoising.learned_variance import LearnedVariance
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise, noise_like
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule

PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = make_schedule(ScheduleConfig(beta_start=0.00085, beta_end=0.012))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = [1, 4, 7, 25]


def network(z_in, timestep, context=None):
    """Fixed, smooth, of all its arguments."""
    phase = timestep.to(z_in.dtype).view(-1, 1, 1, 1) / 300
    return 0.9 * torch.tanh(z_in + 0.3 * z_in.roll(1, -1)) + 0.1 * torch.sin(phase)


def with_variance(z_in, timestep, context=None):
    return torch.cat([network(z_in, timestep), torch.tanh(3 * z_in)], 1)


def seed():
    return [torch.Generator().manual_seed(3)]


def stipple(sampler, prediction, walk, network=network, wrap=lambda denoise: denoise, **options):
    generators, time_defaults = seed(), SAMPLERS[sampler].time_defaults
    denoise = wrap(Denoiser(network, SCHEDULE, prediction, at_levels=not time_defaults.fractional))
    z = initial_noise((1, 2, 5, 5), generators, SCHEDULE)
    return [step.z for step in SAMPLERS[sampler].run(denoise, z, walk, SCHEDULE, generators, **options)]


def reference(scheduler, steps, network=network, prepare=lambda scheduler, generators: None, **options):
    """Each state of diffusers' scheduler; those that hold z_t / alpha scale it back themselves for the network."""
    generators, states = seed(), []
    scheduler.set_timesteps(steps)
    z = torch.randn(1, 2, 5, 5, generator=generators[0])
    z = z / scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])  # 1 where z_t itself is held
    scheduler.set_timesteps(steps)  # forgets that it was asked
    prepare(scheduler, generators)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(z, t), t.expand(1))
        z = scheduler.step(output, t, z, **{name: generators[0] for name in options}).prev_sample
        states.append(z)
    return states


def laid_out(sampler, steps, spacing):
    return times(SCHEDULE, steps, spacing, SAMPLERS[sampler].time_defaults)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", STEPS)
def test_ddpm_is_that_of_diffusers_whatever_its_variance(steps, spacing, prediction, variance, monkeypatch):
    kind = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    scheduler = diffusers.DDPMScheduler(
        **BETAS, clip_sample=False, variance_type=kind, prediction_type=PREDICTION_TYPES[prediction],
        timestep_spacing=spacing, steps_offset=1,
    )  # fmt: skip
    drawn = []

    def noise(shape, generator, **_):
        drawn.append(torch.randn(shape, generator=generator))
        return drawn[-1] * (len(drawn) < steps)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)
    learned = LearnedVariance(with_variance)
    specified, options = (learned, {"interpolation": learned.interpolation}) if variance == "learned" else (network, {})
    found = stipple("ddpm", prediction, laid_out("ddpm", steps, spacing), specified, variance=variance, **options)
    expected = reference(scheduler, steps, with_variance if variance == "learned" else network, generator=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", STEPS)
def test_euler_ancestral_is_that_of_diffusers(steps, prediction, spacing):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, prediction_type=PREDICTION_TYPES[prediction], timestep_spacing=spacing, steps_offset=1
    )
    if prediction == "clean":  # which diffusers does not implement
        with pytest.raises(NotImplementedError):
            reference(scheduler, steps, generator=True)
        return
    found = stipple("euler_ancestral", prediction, laid_out("euler_ancestral", steps, spacing))
    torch.testing.assert_close(found[-1], reference(scheduler, steps, generator=True)[-1], **CLOSE)


class ThirdOrder(diffusers.DPMSolverMultistepScheduler):
    """Its step of third order with the bend weighed by its integral."""

    def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample=None, noise=None, **kwargs):
        z = super().multistep_dpm_solver_third_order_update(model_output_list, *args, sample=sample, noise=noise)
        levels = [self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index + 1 - i]) for i in range(4)]
        growths = [(alpha.log() - sigma.log()).item() for alpha, sigma in levels]
        h, h_0, h_1 = (later - earlier for later, earlier in zip(growths[:-1], growths[1:], strict=True))
        newest, before, before_that = model_output_list[-1], model_output_list[-2], model_output_list[-3]
        slopes = (newest - before) * h / h_0, (before - before_that) * h / h_1
        bend = (slopes[0] - slopes[1]) * h / (h_0 + h_1)
        part = (-math.expm1(-2 * h) - 2 * h) / (2 * h) ** 2
        return z + levels[0][0] * (2 * (part + 0.5) - (part - 0.5)) * bend


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras"])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", STEPS)
def test_multistep_sde_solvers_are_those_of_diffusers(steps, prediction, spacing, order):
    specified = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = ThirdOrder(
        **BETAS, **specified, prediction_type=PREDICTION_TYPES[prediction], steps_offset=1, solver_order=order,
        algorithm_type="sde-dpmsolver++",
    )  # fmt: skip
    sampler = f"dpmpp_{order}m_sde"
    found = stipple(sampler, prediction, laid_out(sampler, steps, spacing))
    for one, other in zip(found, reference(scheduler, steps, generator=True), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_the_parabola_of_diffusers_is_another_and_changes_samples_visibly():
    options = dict(solver_order=3, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing")
    kinds = (diffusers.DPMSolverMultistepScheduler, ThirdOrder)
    ends = [reference(kind(**BETAS, **options), 25, generator=True)[-1] for kind in kinds]
    assert 0.01 < (ends[0] - ends[1]).abs().mean() / ends[1].std() < 0.5


def reverse_process(scheduler, generators):
    """Hand DPMSolverSDEScheduler the noise of the middle, then the whole step's, made of that and a second draw."""
    halves = []

    def noise(start, stop):
        halves.append(noise_like(torch.empty(1, 2, 5, 5), generators))
        if len(halves) == 1:
            return halves[0]
        decay = float(stop / start)  # e^-growth
        whole = (math.sqrt(decay) * halves[0] + halves[1]) / math.sqrt(1 + decay)
        halves.clear()
        return whole

    scheduler.noise_sampler = noise


@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras"])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])  # diffusers has no other
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_sde_is_that_of_diffusers(steps, prediction, spacing, monkeypatch):
    """Its module wants torchsde, of which it uses nothing when its noise comes from elsewhere."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    kind = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    if spacing == "karras" and steps == 1:
        pytest.skip("diffusers begins a single step at the lowest noise level, which is where its linspace of 1 begins")
    specified = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = kind(**BETAS, **specified, prediction_type=PREDICTION_TYPES[prediction], steps_offset=1)
    found = stipple("dpmpp_sde", prediction, laid_out("dpmpp_sde", steps, spacing))
    expected = reference(scheduler, steps, prepare=reverse_process)
    torch.testing.assert_close(found[-1], expected[-1], **CLOSE)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", STEPS)
def test_lcm_is_that_of_diffusers(steps, prediction):
    scheduler = diffusers.LCMScheduler(**BETAS, prediction_type=PREDICTION_TYPES[prediction], clip_sample=False)
    scheduler.set_timesteps(steps)
    walk = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])

    def boundary(denoise):
        def consistency(z, t):
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(round(t * 1000) - 1)
            return c_skip * z + c_out * denoise(z, t)

        return consistency

    expected = reference(scheduler, steps, generator=True)
    for one, other in zip(stipple("lcm", prediction, walk, wrap=boundary), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(
        stipple("lcm", prediction, walk)[-1], expected[-1], rtol=1e-4, atol=1e-4
    )  # too small to see
