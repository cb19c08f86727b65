"""How a model is to be sampled, in the options of diffusers' schedulers, and back: what scheduler_config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args, get_type_hints

from ldm.prediction import check_prediction
from ldm.schedule import ScheduleConfig, make_schedule
from ldm.times import SPACINGS

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
CLASSES = {  # our samplers as diffusers' classes
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
OWN_CLASS = "Schedule"  # the class name in scheduler_config.json where diffusers has none of the kind

# Options of diffusers' classes for which we implement one value, which is the default but for skip_prk_steps. What a
# class does not read may say anything. Nobody clips latents, whatever clip_sample says: nor do diffusers' pipelines.
_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}
_SOLVER = _SIGMAS | {
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "solver_order": 2,
    "thresholding": False,
    "use_dynamic_shifting": False,
    "use_flow_sigmas": False,
}
FIXED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"thresholding": False},
    "DDPMScheduler": {"thresholding": False, "variance_type": "fixed_small"},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": _SIGMAS
    | {
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "sigma_max": None,
        "sigma_min": None,
        "timestep_type": "discrete",
    },
    "HeunDiscreteScheduler": _SIGMAS,
    "DPMSolverMultistepScheduler": _SOLVER
    | {
        "algorithm_type": "dpmsolver++",
        "lambda_min_clipped": -float("inf"),
        "solver_type": "midpoint",
        "use_lu_lambdas": False,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": _SOLVER
    | {
        "disable_corrector": [],
        "predict_x0": True,
        "sigma_max": None,
        "sigma_min": None,
        "solver_p": None,
        "solver_type": "bh2",
    },
    FLOW_CLASS: _SIGMAS | {"invert_sigmas": False, "shift_terminal": None, "use_dynamic_shifting": False},
}
TYPES = {  # of the options that are read; null is what their classes write where an option has no value
    "_class_name": str | None,
    "beta_end": float | None,
    "beta_start": float | None,
    "num_train_timesteps": int,
    "rescale_betas_zero_snr": bool,
    "set_alpha_to_one": bool | None,
    "shift": float,
    "steps_offset": int,
    "use_karras_sigmas": bool | None,
}


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """What a scheduler_config.json says."""

    schedule: ScheduleConfig  # the noise levels
    prediction: str  # what the network outputs, a key of PREDICTIONS
    spacing: str | None = "trailing"  # how a sampler chooses its times, a key of SPACINGS; None: as is its habit
    offset: int = 1  # leading: the index of the lowest time
    ends_clean: bool | None = True  # DDIM, PNDM: at t = 0, or at the first noise level; None: as is the sampler's habit
    sampler: str | None = "ddim"  # a key of SAMPLERS; None: one that we don't have


def as_pipeline(scheduling: Scheduling, name: str) -> Scheduling:
    """How a pipeline of diffusers samples, by its class name, whatever its scheduler's file says.

    Those of Stable Diffusion set steps_offset to 1: it was missing in the files of the first models, and CompVis' DDIM,
    whose leading times these are, counts from 1.
    """
    return replace(scheduling, offset=1) if name.startswith("StableDiffusion") else scheduling


def scheduling_to_diffusers(scheduling: Scheduling) -> dict[str, Any]:
    """Say it in the options of diffusers' schedulers, or in our own words where diffusers has none like it."""
    schedule, prediction = make_schedule(scheduling.schedule).config, scheduling.prediction
    check_prediction(prediction)
    if schedule.name in BETA_SCHEDULES and prediction in PREDICTION_TYPES:
        return {
            "_class_name": CLASSES[scheduling.sampler or "ddim"],
            "beta_schedule": BETA_SCHEDULES[schedule.name],
            "clip_sample": False,
            "num_train_timesteps": schedule.timesteps,
            "prediction_type": PREDICTION_TYPES[prediction],
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "skip_prk_steps": True,
            "steps_offset": scheduling.offset,
            **_where_said(
                beta_start=schedule.beta_start, beta_end=schedule.beta_end, set_alpha_to_one=scheduling.ends_clean
            ),
            **_spacing_to_diffusers(scheduling.spacing),
        }
    if (schedule.name, prediction) == ("flow", "flow"):
        return {
            "_class_name": FLOW_CLASS,
            "num_train_timesteps": schedule.timesteps,
            "shift": schedule.shift,
            **_spacing_to_diffusers(scheduling.spacing),  # for us; diffusers' flow matching knows only linspace
        }
    own = asdict(scheduling) | {"schedule": asdict(schedule)}
    return {"_class_name": OWN_CLASS, **own}


def scheduling_from_diffusers(options: Mapping[str, Any]) -> Scheduling:
    """Read a scheduler_config.json, of any of diffusers' schedulers that has betas, of its flow matching, or ours.

    Raises:
        ValueError: naming the option that we don't implement, or whose value is of the wrong type.
    """
    _check_types({name: value for name, value in options.items() if name in TYPES}, TYPES)
    kind = options.get("_class_name")
    if kind == OWN_CLASS:
        return _own({name: value for name, value in options.items() if not name.startswith("_")})
    _check_fixed(options)
    if kind == FLOW_CLASS:
        schedule = ScheduleConfig(
            name="flow", timesteps=options.get("num_train_timesteps", 1000), shift=options.get("shift", 1.0)
        )
        spacing = _spacing_from_diffusers(options) or "linspace"
        return Scheduling(schedule=schedule, prediction="flow", spacing=spacing, sampler="euler")
    if kind not in CLASSES.values() and "beta_schedule" not in options:
        raise ValueError(f"scheduler {kind} has no beta_schedule; only those made of betas and flow are implemented")
    return Scheduling(
        schedule=_schedule_from_diffusers(options),
        prediction=_translate("prediction_type", options.get("prediction_type", "epsilon"), PREDICTION_TYPES),
        spacing=_spacing_from_diffusers(options),
        offset=options.get("steps_offset", 0),
        ends_clean=options.get("set_alpha_to_one"),
        sampler=next((ours for ours, theirs in CLASSES.items() if theirs == kind), None),
    )


def _own(options: Mapping[str, Any]) -> Scheduling:
    """Read what is in our own words."""
    schedule = options.get("schedule")
    if not isinstance(schedule, Mapping):
        raise ValueError(f"scheduler option schedule = {schedule!r} must hold the keys of ScheduleConfig")
    _check_types(schedule, get_type_hints(ScheduleConfig))
    told = {"prediction": None} | {name: value for name, value in options.items() if name != "schedule"}
    _check_types(told, get_type_hints(Scheduling))
    check_prediction(told["prediction"])
    for name, known in (("spacing", SPACINGS), ("sampler", CLASSES)):
        if told.get(name) is not None and told[name] not in known:
            raise ValueError(f"scheduler option {name} = {told[name]!r} is unknown; use one of {', '.join(known)}")
    return Scheduling(schedule=make_schedule(ScheduleConfig(**schedule)).config, **told)


def _check_types(options: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is not among `types`, or not of its type; a whole number is a float too."""
    for name, value in options.items():
        if name not in types:
            raise ValueError(f"scheduler option {name} is unknown; use one of {', '.join(types)}")
        kinds = get_args(types[name]) or (types[name],)
        kinds += (int,) if float in kinds else ()
        if type(value) not in kinds:
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"scheduler option {name} = {value!r:.80} is of the wrong type; it must be {words}")


def _schedule_from_diffusers(options: Mapping[str, Any]) -> ScheduleConfig:
    name = _translate("beta_schedule", options.get("beta_schedule", "linear"), BETA_SCHEDULES)
    start, end = (0.00085, 0.012) if options.get("_class_name") == CLASSES["heun"] else (1e-4, 0.02)  # their defaults
    return ScheduleConfig(
        name=name,
        timesteps=options.get("num_train_timesteps", 1000),
        beta_start=None if name == "cosine" else options.get("beta_start", start),
        beta_end=None if name == "cosine" else options.get("beta_end", end),
        zero_terminal_snr=options.get("rescale_betas_zero_snr", False),
    )


def _spacing_to_diffusers(spacing: str | None) -> dict[str, Any]:
    """diffusers' Karras is a switch beside the spacing, and between the ends of that."""
    return (
        {"timestep_spacing": "linspace", "use_karras_sigmas": True}
        if spacing == "karras"
        else _where_said(timestep_spacing=spacing)
    )


def _spacing_from_diffusers(options: Mapping[str, Any]) -> str | None:
    if options.get("use_karras_sigmas"):
        return "karras"
    names = {name: name for name in SPACINGS if name != "karras"}
    said = options.get("timestep_spacing")
    return None if said is None else _translate("timestep_spacing", said, names)


def _where_said(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_fixed(options: Mapping[str, Any]) -> None:
    """Refuse the values that we don't implement of what the scheduler's own class reads."""
    for name, value in ({"trained_betas": None} | FIXED.get(options.get("_class_name"), {})).items():
        said = options.get(name, value)
        if said != value:
            raise ValueError(f"scheduler option {name} = {said!r} is not implemented; only {value!r} is")


def _translate(option: str, theirs: str, names: Mapping[str, str]) -> str:
    """Find our name for diffusers' value of a scheduler option."""
    for ours, name in names.items():
        if name == theirs:
            return ours
    raise ValueError(f"scheduler option {option} = {theirs!r} is not implemented; only {', '.join(names.values())} are")
