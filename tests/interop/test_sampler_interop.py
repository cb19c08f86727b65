"""Our samplers take the steps of diffusers' schedulers, from the same network, whatever it predicts.

They compare all inputs of the network (z_t at each call, scaled as it sees it, and the timestep) and the end. Whole
pictures, and which times are chosen, are in test_diffusers_pictures.py and test_schedule_interop.py.
"""

import functools

import diffusers
import pytest
import torch

from ldm.denoising.denoiser import Denoiser
from ldm.formats.diffusers.known_schedulers import CLASSES
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise, middle, step_points
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule

PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = (1, 4, 7, 25)
SPACINGS = {
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "log_snr": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
}
# sampler, options of diffusers' class, options of Stipple's sampler
CASES = {
    "ddim": ("ddim", {"clip_sample": False}, {}),
    "pndm": ("pndm", {"skip_prk_steps": True, "set_alpha_to_one": True}, {}),
    "euler": ("euler", {}, {}),
    "heun": ("heun", {}, {}),
    "dpm2": ("dpm2", {}, {}),
    "lms": ("lms", {}, {}),
    "dpmpp_2m": ("dpmpp_2m", {}, {}),
    "dpmpp_3m": ("dpmpp_3m", {"solver_order": 3}, {"curvature": 0.5}),
    "unipc": ("unipc", {}, {}),
    "unipc, order 3": ("unipc", {"solver_order": 3}, {"order": 3}),
    "deis": ("deis", {}, {}),
    "deis, order 3": ("deis", {"solver_order": 3}, {"order": 3}),
}
SIGMAS = ("euler", "heun", "dpm2", "lms")  # which hold z_t / alpha, and scale it back themselves for the network
ZERO_SNR = ("ddim", "euler", "dpmpp_2m", "dpmpp_3m", "unipc", "unipc, order 3")  # which read rescale_betas_zero_snr

# What diffusers does otherwise: why, where, and the largest difference that it makes here.
DIFFERENCES = {
    "DDIM and PNDM step from t to t - 1000 // S, which is not the next of their times": (
        lambda case, spacing, zero, steps: (
            case in ("ddim", "pndm") and (spacing == "linspace" and steps > 1 or spacing == "trailing" and 1000 % steps)
        ),
        1.0,
    ),
    "one step of linspace, and of what is laid between its ends, begins at the first noise level": (
        lambda case, spacing, zero, steps: (
            steps == 1 and case in ("ddim", "pndm", *SIGMAS) and spacing not in ("trailing", "leading")
        ),
        8.0,
    ),
    "DEIS' one step of Karras or of equal logarithms has no length": (
        lambda case, spacing, zero, steps: "deis" in case and spacing in ("karras", "log_snr") and steps == 1,
        8.0,
    ),
    "an alpha of 0 is 2^-12": (
        lambda case, spacing, zero, steps: zero and case != "ddim" and spacing != "leading",
        5e-4,
    ),
    "of times in equal logarithms, solvers tell the network the timestep cut off, not rounded": (
        lambda case, spacing, zero, steps: case not in SIGMAS and spacing == "log_snr",
        5e-3,
    ),
    "KDPM2 tells the network rounded timesteps on Karras' times, but fractional ones in the middle": (
        lambda case, spacing, zero, steps: case == "dpm2" and spacing == "karras",
        1.3e-4,
    ),
}


def network(z_in, timestep, context=None):
    """Fixed, smooth, of all its arguments."""
    phase = timestep.to(z_in.dtype).view(-1, 1, 1, 1) / 300
    return 0.9 * torch.tanh(z_in + 0.3 * z_in.roll(1, -1)) + 0.1 * torch.sin(phase)


def seeds(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


@functools.cache
def schedule_of(zero_terminal_snr):
    return make_schedule(ScheduleConfig(beta_start=0.00085, beta_end=0.012, zero_terminal_snr=zero_terminal_snr))


def stipple(sampler, prediction, walked, generators, schedule, **options):
    """(timestep, z as the network sees it) of each call, and the end."""
    seen = []

    def watched(z_in, timestep, context):
        seen.append((timestep[0].item(), z_in))
        return network(z_in, timestep)

    denoise = Denoiser(watched, schedule, prediction, at_levels=not SAMPLERS[sampler].time_defaults.fractional)
    z = initial_noise((len(generators), 2, 5, 5), generators, schedule)
    *_, last = SAMPLERS[sampler].run(denoise, z, walked, schedule, generators, **options)
    return [*seen, (0.0, last.z)]


def reference(scheduler, steps, generators, **options):
    """The same of diffusers' scheduler."""
    scheduler.set_timesteps(steps)
    z = torch.cat([torch.randn(1, 2, 5, 5, generator=g) for g in generators])
    z = z / scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])  # 1 where z_t itself is held
    scheduler.set_timesteps(steps)  # forgets that it was asked
    return stepped(scheduler, z, **options)


def stepped(scheduler, z, **options):
    seen = []
    for t in scheduler.timesteps:
        seen.append((t.item(), scheduler.scale_model_input(z, t)))
        z = scheduler.step(network(seen[-1][1], t.expand(len(z))), t, z, **options).prev_sample
    return [*seen, (0.0, z)]


def apart(one, other):
    """The largest difference of two trajectories, relative to 1 + |z|, and of their timesteps."""
    assert len(one) == len(other)
    values = [((a - b).abs() / (1 + b.abs())).max().item() for (_, a), (_, b) in zip(one, other, strict=True)]
    return max(values), max(abs(s - t) for (s, _), (t, _) in zip(one, other, strict=True))


def predictions(case, zero):
    left_out = {"noise": zero, "clean": case in ("pndm", "dpm2")}  # undefined; not implemented by diffusers
    return [prediction for prediction in PREDICTION_TYPES if not left_out.get(prediction)]


def difference(case, spacing, zero, steps, prediction):
    sampler, specified, options = CASES[case]
    condition = specified | SPACINGS[spacing] | {"steps_offset": 1, "prediction_type": PREDICTION_TYPES[prediction]}
    condition |= {"rescale_betas_zero_snr": True} if zero else {}
    scheduler = getattr(diffusers, CLASSES[sampler])(**BETAS, **condition)
    options = options | ({"averaged": prediction} if sampler == "pndm" else {})
    schedule = schedule_of(zero)
    walked = times(schedule, steps, spacing, SAMPLERS[sampler].time_defaults)
    if sampler == "pndm":
        walked[-1] = 0.0
    return apart(
        stipple(sampler, prediction, walked, seeds(2), schedule, **options), reference(scheduler, steps, seeds(2))
    )


def comparable(case, spacing, zero, steps):
    """Whether diffusers has it at all."""
    switched = spacing in ("karras", "log_snr")
    if switched and case in ("ddim", "pndm") or zero and case not in ZERO_SNR:
        return False
    return not (zero and switched and steps == 25 and case != "euler")  # they fail: two times are the same timestep


ALL = [
    (case, spacing, zero, steps)
    for case in CASES
    for spacing in SPACINGS
    for zero in (False, True)
    for steps in STEPS
    if comparable(case, spacing, zero, steps)
]


def reasons(walk):
    return [reason for reason, (where, _) in DIFFERENCES.items() if where(*walk)]


@pytest.mark.parametrize("walk", [walk for walk in ALL if not reasons(walk)], ids=str)
def test_deterministic_samplers_walk_the_trajectories_of_diffusers(walk):
    for prediction in predictions(walk[0], walk[2]):
        values, timesteps = difference(*walk, prediction)
        assert values < 1e-4 and timesteps < 3e-3


@pytest.mark.parametrize("reason", DIFFERENCES)
def test_known_differences_from_diffusers_are_as_large_as_documented(reason):
    walks = [walk for walk in ALL if reasons(walk) == [reason]]
    found = [difference(*walk, prediction)[0] for walk in walks for prediction in predictions(walk[0], walk[2])]
    most = DIFFERENCES[reason][1]
    assert most / 2 < max(found) < most


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras"])
@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_2s_takes_the_steps_of_diffusers_where_it_walks_our_middles(spacing, prediction, steps):
    """Its steps are network calls, and its middles every other time so Stipple's times are passed to it."""
    schedule = schedule_of(False)
    walked = times(schedule, steps, spacing, SAMPLERS["dpmpp_2s"].time_defaults)
    points = [p for t, s in step_points(walked, schedule) for p in ((t, middle(t, s, schedule)) if s.sigma else (t,))]
    scheduler = diffusers.DPMSolverSinglestepScheduler(**BETAS, prediction_type=PREDICTION_TYPES[prediction])
    scheduler.set_timesteps(len(points))
    scheduler.timesteps = schedule.timestep(torch.tensor([p.time for p in points], dtype=torch.float64)).round().long()
    scheduler.sigmas = torch.tensor([*(p.sigma / p.alpha for p in points), 0.0])
    scheduler.set_begin_index(0)  # or it looks for its place by the timestep, which may be there twice
    z = initial_noise((2, 2, 5, 5), seeds(2), schedule)
    assert apart(stipple("dpmpp_2s", prediction, walked, seeds(2), schedule), stepped(scheduler, z))[0] < 1e-4


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_ddpm_and_stochastic_ddim_are_those_of_diffusers(prediction):
    schedule, specified = schedule_of(False), PREDICTION_TYPES[prediction]
    for sampler, kind, options in (("ddpm", "DDPMScheduler", {}), ("ddim", "DDIMScheduler", {"eta": 0.6})):
        scheduler = getattr(diffusers, kind)(
            **BETAS, clip_sample=False, timestep_spacing="trailing", prediction_type=specified
        )
        generators = seeds(1)
        expected = reference(scheduler, 50, generators, generator=generators[0], **options)
        found = stipple(sampler, prediction, times(schedule, 50), seeds(1), schedule, **options)
        assert apart(found, expected)[0] < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_flow_is_that_of_diffusers(shift):
    """Its own times stop at 1/1000 of the unshifted range, so Stipple's times are passed to it."""
    schedule = make_schedule(ScheduleConfig(name="flow", shift=shift))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=times(schedule, 20)[:-1].tolist())
    scheduler.scale_model_input = lambda z, t: z
    expected = stepped(scheduler, initial_noise((2, 2, 5, 5), seeds(2), schedule))
    assert apart(stipple("euler", "flow", times(schedule, 20), seeds(2), schedule), expected)[0] < 1e-5
