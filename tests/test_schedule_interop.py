"""Our schedules and diffusers' schedulers are the same noise levels, stored in the same file."""

import diffusers
import pytest
import torch

from ldm.interop import load_scheduling, save_scheduling
from ldm.options import Scheduling, scheduling_from_diffusers
from ldm.schedule import ScheduleConfig, make_schedule, times

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
    "flow": Scheduling(schedule=ScheduleConfig(name="flow", shift=3.0), prediction="flow"),
    "flow, velocity": Scheduling(schedule=ScheduleConfig(name="flow"), prediction="velocity"),
    "table, flow": Scheduling(schedule=ScheduleConfig(), prediction="flow", spacing="linspace"),
}
ALL = {name: Scheduling(schedule=table, prediction="velocity", spacing="leading") for name, table in TABLES.items()}


@pytest.mark.parametrize("scheduling", (ALL | OTHERS).values(), ids=(ALL | OTHERS).keys())
def test_a_schedule_survives_its_file(scheduling, tmp_path):
    save_scheduling(scheduling, tmp_path)
    back = load_scheduling(tmp_path)
    assert (back.prediction, back.spacing) == (scheduling.prediction, scheduling.spacing)
    assert make_schedule(back.schedule).config == make_schedule(scheduling.schedule).config


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_diffusers_reads_the_same_noise_levels_and_timesteps(table, spacing, tmp_path):
    scheduling = Scheduling(schedule=table, prediction="noise", spacing=spacing)
    save_scheduling(scheduling, tmp_path)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    schedule = make_schedule(table)
    levels = torch.arange(1, table.timesteps + 1, dtype=torch.float64) / table.timesteps
    assert torch.allclose(schedule(levels)[0].square().float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    theirs.set_timesteps(20)
    assert schedule.timestep(times(schedule, 20, spacing)[:-1]).tolist() == theirs.timesteps.tolist()


def test_diffusers_reads_the_same_flow(tmp_path):
    save_scheduling(OTHERS["flow"], tmp_path)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    schedule = make_schedule(OTHERS["flow"].schedule)
    levels = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    assert torch.allclose(schedule(levels)[1].float(), theirs.sigmas[:1000])
    assert torch.allclose(schedule.timestep(levels), theirs.timesteps)


@pytest.mark.parametrize("kind", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_noise_levels_of_any_diffusers_scheduler_with_betas_are_read(kind, tmp_path):
    getattr(diffusers, kind)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        tmp_path / "scheduler"
    )
    assert load_scheduling(tmp_path).schedule == TABLES["SD"]


@pytest.mark.parametrize(
    "change",
    [
        {"trained_betas": [0.1, 0.2]},
        {"clip_sample": True},
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "learned"},
        {"timestep_spacing": "random"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_scheduler_option_that_we_do_not_implement_is_named(change):
    with pytest.raises(ValueError, match=f"scheduler option {next(iter(change))} "):
        scheduling_from_diffusers({"_class_name": "DDIMScheduler", "beta_schedule": "linear"} | change)


def test_a_scheduler_without_betas_is_named():
    with pytest.raises(ValueError, match="EDMEulerScheduler has no beta_schedule"):
        scheduling_from_diffusers({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0})
