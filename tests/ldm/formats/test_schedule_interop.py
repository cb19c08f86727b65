"""Our schedules and diffusers' schedulers are the same noise levels, stored in the same file."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from ldm.formats.compvis.compvis_schedule import schedule_from_compvis
from ldm.formats.diffusers.known_schedulers import CLASSES, FIXED, VARIANTS
from ldm.formats.diffusers.networks_folder import load_scheduling, save_scheduling
from ldm.formats.diffusers.scheduler import (
    DIFFUSERS_SPACINGS,
    Scheduling,
    scheduling_from_diffusers,
    scheduling_to_diffusers,
)
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS, times
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule

TABLES = {
    "DDPM": ScheduleConfig(name="linear"),
    "LDM": ScheduleConfig(beta_start=0.0015, beta_end=0.0195),
    "SD": ScheduleConfig(beta_start=0.00085, beta_end=0.012),
    "zero SNR": ScheduleConfig(beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True),
    "cosine": ScheduleConfig(name="cosine"),
    "short": ScheduleConfig(name="linear", timesteps=100),
}
OTHERS = {
    "VE": Scheduling(schedule=ScheduleConfig(name="ve", sigma_max=80.0), prediction="noise"),
    "sub-VP": Scheduling(schedule=ScheduleConfig(name="sub_vp"), prediction="score"),
    "EDM": Scheduling(schedule=ScheduleConfig(name="edm", sigma_max=160.0), prediction="edm"),
    "continuous": Scheduling(schedule=ScheduleConfig(name="linear", continuous=True), prediction="noise"),
    "table, EDM": Scheduling(schedule=ScheduleConfig(continuous=True), prediction="edm"),
    "flow": Scheduling(schedule=ScheduleConfig(name="flow", shift=3.0), prediction="flow"),
    "flow, velocity": Scheduling(schedule=ScheduleConfig(name="flow"), prediction="velocity"),
    "table, flow": Scheduling(schedule=ScheduleConfig(), prediction="flow", spacing=None, offset=0, ends_clean=None),
    "SD1": Scheduling(schedule=TABLES["SD"], prediction="noise", spacing=None, ends_clean=False, sampler="pndm"),
    "Karras": Scheduling(schedule=TABLES["SD"], prediction="noise", spacing="karras", sampler="dpmpp_2m"),
}
ALL = {name: Scheduling(schedule=table, prediction="velocity", spacing="leading") for name, table in TABLES.items()}


@pytest.mark.parametrize("scheduling", (ALL | OTHERS).values(), ids=(ALL | OTHERS).keys())
def test_a_schedule_survives_its_file(scheduling, tmp_path):
    save_scheduling(scheduling, tmp_path)
    back = load_scheduling(tmp_path)
    schedule = make_schedule(scheduling.schedule).config
    if schedule.name == "flow" and scheduling.prediction == "flow":  # which diffusers only samples with Euler's rule
        scheduling = replace(scheduling, sampler="euler")
    assert back == replace(scheduling, schedule=schedule)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_diffusers_reads_the_same_noise_levels_and_timesteps(table, spacing, tmp_path):
    scheduling = Scheduling(schedule=table, prediction="noise", spacing=spacing)
    save_scheduling(scheduling, tmp_path)
    reference = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    schedule = make_schedule(table)
    levels = torch.arange(1, table.timesteps + 1, dtype=torch.float64) / table.timesteps
    assert torch.allclose(schedule(levels)[0].square().float(), reference.alphas_cumprod, rtol=1e-4, atol=1e-7)
    reference.set_timesteps(20)
    assert schedule.timestep(times(schedule, 20, spacing)[:-1]).tolist() == reference.timesteps.tolist()


def test_diffusers_reads_the_same_flow(tmp_path):
    save_scheduling(OTHERS["flow"], tmp_path)
    reference = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    schedule = make_schedule(OTHERS["flow"].schedule)
    levels = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    assert torch.allclose(schedule(levels)[1].float(), reference.sigmas[:1000])
    assert torch.allclose(schedule.timestep(levels), reference.timesteps)


def read(**options):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return scheduling_from_diffusers(betas | options)


@pytest.mark.parametrize("sampler", [name for name in CLASSES if name != "dpmpp_sde"])  # which needs torchsde
def test_the_scheduler_classes_of_diffusers_are_read_and_written(sampler, tmp_path):
    kind = getattr(diffusers, CLASSES[sampler])
    options = {"skip_prk_steps": True} if sampler == "pndm" else VARIANTS.get(sampler, {})
    kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options).save_pretrained(
        tmp_path / "scheduler"
    )
    found = load_scheduling(tmp_path)
    time_defaults = SAMPLERS[sampler].time_defaults
    assert (found.schedule, found.sampler, found.offset) == (TABLES["SD"], sampler, 0)
    assert found.spacing in (time_defaults.spacing, None)  # what they write out is their default, if they read it
    assert (
        found.ends_clean in (time_defaults.ends_clean, None) or sampler == "lcm"
    )  # which always ends at 0, whatever it says
    written = scheduling_to_diffusers(found)
    assert scheduling_from_diffusers(written) == found
    again = kind.from_config(written)
    assert {name: again.config[name] for name in options} == options
    assert torch.equal(again.alphas_cumprod, kind.from_config(kind.load_config(tmp_path / "scheduler")).alphas_cumprod)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_and_spacing_survives_its_file_which_diffusers_opens(sampler, spacing):
    """Where diffusers has no such sampler its DDIM opens the model, and Stipple finds its own again."""
    scheduling = Scheduling(schedule=TABLES["SD"], prediction="velocity", spacing=spacing, sampler=sampler)
    written = scheduling_to_diffusers(scheduling)
    assert written["_class_name"] == CLASSES.get(sampler, "DDIMScheduler")
    back = scheduling_from_diffusers(written)
    assert (back.schedule, back.prediction, back.sampler) == (scheduling.schedule, "velocity", sampler)
    assert back.spacing == (None if sampler in ("dpmpp_2s", "lcm") and spacing in DIFFUSERS_SPACINGS else spacing)
    if sampler != "dpmpp_sde":  # whose class needs torchsde
        opened = getattr(diffusers, written["_class_name"]).from_config(written)
        opened.set_timesteps(7)
        assert len(set(opened.timesteps.tolist())) >= 7


def test_what_diffusers_fixes_is_its_default():
    """A file that leaves an option out means that."""
    for kind, fixed in FIXED.items():
        if kind != "DPMSolverSDEScheduler":  # which needs torchsde
            config = getattr(diffusers, kind)().config
            assert {name: config[name] for name in fixed if name != "skip_prk_steps"} == {
                name: value for name, value in fixed.items() if name != "skip_prk_steps"
            }


# The files of the models that everybody has.
STABLE_DIFFUSION_1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
STABLE_DIFFUSION_2 = STABLE_DIFFUSION_1 | {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}
STABLE_DIFFUSION_2_1 = STABLE_DIFFUSION_2 | {"_class_name": "DDIMScheduler"}
SD_TURBO = STABLE_DIFFUSION_1 | {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "sigma_max": None,
    "sigma_min": None,
    "timestep_spacing": "trailing",
    "timestep_type": "discrete",
    "use_karras_sigmas": False,
}
LDM_TEXT2IMG = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.0.4",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "timestep_values": None,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}


@pytest.mark.parametrize(
    ("options", "sampler", "prediction", "spacing", "offset", "ends_clean"),
    [
        (STABLE_DIFFUSION_1, "pndm", "noise", None, 1, False),
        (STABLE_DIFFUSION_2, "euler", "velocity", None, 1, False),
        (STABLE_DIFFUSION_2_1, "ddim", "velocity", None, 1, False),
        (SD_TURBO, "euler", "noise", "trailing", 1, False),
        (LDM_TEXT2IMG, "ddim", "noise", None, 0, None),
    ],
    ids=["SD 1", "SD 2", "SD 2.1", "SD turbo", "LDM"],
)
def test_the_files_of_known_models_are_read(options, sampler, prediction, spacing, offset, ends_clean):
    expected = Scheduling(
        schedule=TABLES["SD"],
        prediction=prediction,
        spacing=spacing,
        offset=offset,
        ends_clean=ends_clean,
        sampler=sampler,
    )
    assert scheduling_from_diffusers(options) == expected


SAMPLED = ["ddim", "pndm", "euler", "euler_ancestral", "heun", "lms", "dpmpp_2m", "dpmpp_3m", "unipc", "deis"]
MODELS = {"SD 1": STABLE_DIFFUSION_1, "turbo": SD_TURBO | {"steps_offset": 0}}
WALKS = [
    (*x, y, z) for x in MODELS.items() for y in SAMPLED for z in ("as specified", "leading", "trailing", "linspace")
]
# diffusers lays Karras between the ends of the other spacing, so where that is not linspace, elsewhere than we
WALKS += [("SD 1", STABLE_DIFFUSION_1, sampler, "karras") for sampler in ("euler", "heun", "dpmpp_2m", "unipc")]


@pytest.mark.parametrize(
    ("options", "sampler", "spacing"),
    [walk[1:] for walk in WALKS],
    ids=[f"{model}-{sampler}-{spacing}" for model, _, sampler, spacing in WALKS],
)
@pytest.mark.parametrize("steps", [2, 7, 50, 600])
def test_every_sampler_walks_the_timesteps_and_alphas_of_diffusers(options, sampler, spacing, steps):
    """Between levels diffusers interpolates sigma / alpha and Stipple its logarithm, up to 2 % apart at first."""
    changes = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    options = options | ({} if spacing == "as specified" else changes)
    kind = getattr(diffusers, CLASSES[sampler])
    reference = kind.from_config({name: value for name, value in options.items() if name[0] != "_"})
    reference.set_timesteps(steps)
    found, time_defaults = scheduling_from_diffusers(options), SAMPLERS[sampler].time_defaults
    schedule = make_schedule(found.schedule)
    walk = times(schedule, steps, found.spacing or time_defaults.spacing, time_defaults, found.offset)[:-1]
    timesteps = schedule.timestep(walk) if time_defaults.fractional else schedule.timestep(walk).round()
    repeated = {"pndm": 1, "heun": slice(2, None, 2)}.get(sampler)  # they list the times of calls
    listed = reference.timesteps if repeated is None else np.delete(reference.timesteps.numpy(), repeated)
    np.testing.assert_allclose(timesteps, np.asarray(listed), atol=2e-3)
    alpha, sigma = schedule(walk)
    if hasattr(reference, "sigmas"):
        sigmas = reference.sigmas[:-1] if sampler != "heun" else reference.sigmas[:-1][::2]
        np.testing.assert_allclose(sigma / alpha, sigmas, rtol=2e-2 if steps == 600 else 1e-3)
    else:
        np.testing.assert_allclose(alpha.square(), reference.alphas_cumprod[np.asarray(listed)], rtol=2e-5)


REFUSED = [
    ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}),
    ("DDIMScheduler", {"thresholding": True}),
    ("DDIMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDIMScheduler", {"prediction_type": "learned"}),
    ("DDIMScheduler", {"timestep_spacing": "random"}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("DDPMScheduler", {"variance_type": "learned"}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
    ("HeunDiscreteScheduler", {"use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("LMSDiscreteScheduler", {"use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {"use_beta_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
]


@pytest.mark.parametrize(
    ("kind", "change"), REFUSED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_a_scheduler_option_that_we_do_not_implement_is_named(kind, change):
    with pytest.raises(ValueError, match=f"scheduler option {next(iter(change))} "):
        read(_class_name=kind, **change)


OWN = {"_class_name": "Schedule", "prediction": "flow", "schedule": {"name": "ve"}}


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("num_train_timesteps", {"num_train_timesteps": "1000"}),
        ("num_train_timesteps", {"num_train_timesteps": True}),
        ("num_train_timesteps", {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": None}),
        ("shift", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "3"}),
        ("steps_offset", {"steps_offset": "a"}),
        ("steps_offset", {"steps_offset": 0.5}),
        ("beta_start", {"beta_start": [0.1]}),
        ("beta_schedule", {"beta_schedule": ["linear"]}),
        ("prediction_type", {"prediction_type": {}}),
        ("timestep_spacing", {"timestep_spacing": 3}),
        ("set_alpha_to_one", {"set_alpha_to_one": "yes"}),
        ("rescale_betas_zero_snr", {"rescale_betas_zero_snr": 1}),
        ("use_karras_sigmas", {"use_karras_sigmas": "no"}),
        ("_class_name", {"_class_name": ["DDIMScheduler"]}),
        ("schedule", {"_class_name": "Schedule"}),
        ("schedule", OWN | {"schedule": ["ve"]}),
        ("gamma", OWN | {"schedule": {"name": "ve", "gamma": 2}}),
        ("timesteps", OWN | {"schedule": {"timesteps": 10.5}}),
        ("prediction", {name: value for name, value in OWN.items() if name != "prediction"}),
        ("offset", OWN | {"offset": None}),
        ("spacing", OWN | {"spacing": "random"}),
        ("sampler", OWN | {"sampler": "plms"}),
        ("an_option_of_tomorrow", OWN | {"an_option_of_tomorrow": 1}),
    ],
)
def test_an_option_of_the_wrong_type_is_named(option, change):
    options = {} if change.get("_class_name") == "Schedule" else STABLE_DIFFUSION_1
    with pytest.raises(ValueError, match=f"^scheduler option {option} [^\n]+$"):
        scheduling_from_diffusers(options | change)


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod"])
@pytest.mark.parametrize("table", [torch.tensor(0.5), torch.arange(1000), torch.rand(5, 2), torch.rand(1)])
def test_a_table_of_noise_levels_that_is_none_is_named(name, table):
    with pytest.raises(ValueError, match=f"^{name} is of shape .*remove it"):
        schedule_from_compvis({name: table})


def test_options_that_another_sampler_reads_refuse_nothing():
    strange = {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "interpolation_type": "log_linear"}
    assert read(_class_name="DDIMScheduler", **strange) == read(_class_name="DDIMScheduler")
    assert read(_class_name="TCDScheduler").sampler is None


def test_latents_are_not_clipped_whatever_the_file_specifies():
    """StableDiffusionPipeline sets clip_sample to false, too; it is true by default, for pictures."""
    assert read(_class_name="DDIMScheduler", clip_sample=True) == read(_class_name="DDIMScheduler")


def test_a_scheduler_without_betas_is_named():
    with pytest.raises(ValueError, match="EDMEulerScheduler has no beta_schedule"):
        scheduling_from_diffusers({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0})
