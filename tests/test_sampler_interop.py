"""Our samplers take the steps of diffusers' schedulers, from a fixed network, whatever it predicts.

Whole pictures, and which times are chosen, are in test_diffusers_pictures.py and test_schedule_interop.py.
"""

import diffusers
import pytest
import torch

from ldm.denoiser import Denoiser
from ldm.samplers import SAMPLERS
from ldm.schedule import ScheduleConfig, make_schedule
from ldm.times import times
from ldm.walk import initial_noise

PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = make_schedule(ScheduleConfig(beta_start=0.00085, beta_end=0.012))


def network(z_in, timestep, context=None):
    """Fixed, smooth, of all its arguments."""
    phase = timestep.to(z_in.dtype).view(-1, 1, 1, 1) / 300
    return 0.9 * torch.tanh(z_in + 0.3 * z_in.roll(1, -1)) + 0.1 * torch.sin(phase)


def ours(sampler, prediction, spacing, steps, generators, schedule=SCHEDULE, **options):
    denoise = Denoiser(network, schedule, prediction)
    z = initial_noise((len(generators), 2, 5, 5), generators, schedule)
    walk = times(schedule, steps, spacing, SAMPLERS[sampler].habit)
    *_, last = SAMPLERS[sampler].run(denoise, z, walk, schedule, generators, **options)
    return last.z


def seeds(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def theirs(scheduler, steps, generators, **options):
    """Run diffusers' scheduler; Euler and Heun hold z_t / alpha, and scale it back themselves for the network."""
    scheduler.set_timesteps(steps)
    z = torch.cat([torch.randn(1, 2, 5, 5, generator=g) for g in generators])
    z = z / scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])  # 1 where z_t itself is held
    scheduler.set_timesteps(steps)  # forgets that it was asked
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(z, t), t.expand(len(z)))
        z = scheduler.step(output, t, z, **options).prev_sample
    return z


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_that_of_diffusers(prediction, spacing):
    options = {"timestep_spacing": spacing, "steps_offset": 1, "prediction_type": PREDICTION_TYPES[prediction]}
    scheduler = diffusers.DDIMScheduler(**BETAS, **options, clip_sample=False)
    end = theirs(scheduler, 50, seeds(2))
    torch.testing.assert_close(ours("ddim", prediction, spacing, 50, seeds(2)), end, rtol=1e-5, atol=1e-5)


def test_stochastic_ddim_is_that_of_diffusers():
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")
    generators = seeds(1)
    end = theirs(scheduler, 20, generators, eta=0.6, generator=generators[0])
    torch.testing.assert_close(ours("ddim", "noise", "trailing", 20, seeds(1), eta=0.6), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_ddpm_is_that_of_diffusers(prediction):
    scheduler = diffusers.DDPMScheduler(
        **BETAS, clip_sample=False, timestep_spacing="trailing", prediction_type=PREDICTION_TYPES[prediction]
    )
    generators = seeds(1)
    end = theirs(scheduler, 50, generators, generator=generators[0])
    torch.testing.assert_close(ours("ddpm", prediction, "trailing", 50, seeds(1)), end, rtol=1e-5, atol=1e-5)


SOLVERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [4, 25])
def test_solvers_are_those_of_diffusers(sampler, prediction, spacing, steps):
    kind, said = SOLVERS[sampler], PREDICTION_TYPES[prediction]
    end = theirs(kind(**BETAS, timestep_spacing=spacing, steps_offset=1, prediction_type=said), steps, seeds(2))
    torch.testing.assert_close(ours(sampler, prediction, spacing, steps, seeds(2)), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
@pytest.mark.parametrize("steps", [2, 3, 5, 50])
def test_pndm_is_that_of_diffusers(prediction, steps):
    said = PREDICTION_TYPES[prediction]
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1, prediction_type=said
    )
    end = theirs(scheduler, steps, seeds(2))
    walk = times(SCHEDULE, steps, "leading")
    z = initial_noise((2, 2, 5, 5), seeds(2), SCHEDULE)
    denoise = Denoiser(network, SCHEDULE, prediction)
    *_, last = SAMPLERS["pndm"].run(denoise, z, walk, SCHEDULE, seeds(2), averaged=prediction)
    torch.testing.assert_close(last.z, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_flow_is_that_of_diffusers(shift):
    """Its own times stop at 1/1000 of the unshifted range, so ours are handed to it."""
    schedule = make_schedule(ScheduleConfig(name="flow", shift=shift))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=times(schedule, 20)[:-1].tolist())
    z = torch.cat([torch.randn(1, 2, 5, 5, generator=g) for g in seeds(2)])
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t.expand(2)), t, z).prev_sample
    torch.testing.assert_close(ours("euler", "flow", "trailing", 20, seeds(2), schedule), z, rtol=1e-5, atol=1e-5)
