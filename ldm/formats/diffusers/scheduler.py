"""How a model is sampled, converted to and from the options of diffusers' schedulers (scheduler_config.json)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args, get_type_hints

from ldm.denoising.prediction import check_prediction
from ldm.formats.diffusers.known_schedulers import (
    BETAS,
    CLASSES,
    FIXED,
    FLOW_CLASS,
    OTHER_BETAS,
    VARIANTS,
    WITHOUT_SPACING,
    WITHOUT_SWITCHES,
)
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
DIFFUSERS_SPACINGS = ("trailing", "leading", "linspace")
SWITCHES = {"karras": "use_karras_sigmas", "log_snr": "use_exponential_sigmas"}  # switches in diffusers
OWN_CLASS = "Schedule"  # the class name of schedules that diffusers does not have
TYPES = {  # of the options that are read; diffusers writes null for an option without a value
    "_class_name": str | None,
    "beta_end": float | None,
    "beta_start": float | None,
    "continuous": bool,  # an option of Stipple, which diffusers ignores
    "num_train_timesteps": int,
    "rescale_betas_zero_snr": bool,
    "sampler": str | None,  # of Stipple, for samplers that diffusers does not have
    "set_alpha_to_one": bool | None,
    "shift": float,
    "spacing": str | None,  # of Stipple, for spacings that diffusers does not have
    "steps_offset": int,
    "use_exponential_sigmas": bool | None,
    "use_karras_sigmas": bool | None,
}


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """The noise levels of a model, its prediction, and how it is sampled by default."""

    schedule: ScheduleConfig  # the noise levels
    prediction: str  # what the network outputs, a key of PREDICTIONS
    spacing: str | None = "trailing"  # of the sampler's times, a key of SPACINGS; None: the sampler's default
    offset: int = 1  # leading: the index of the lowest time
    ends_clean: bool | None = True  # DDIM, PNDM: at t = 0, or at the first noise level; None: the sampler's default
    sampler: str | None = "ddim"  # a key of SAMPLERS; None: not supported


def as_pipeline(scheduling: Scheduling, name: str) -> Scheduling:
    """Apply what a pipeline of diffusers changes in its scheduler, by the class name of the pipeline.

    Pipelines of Stable Diffusion set steps_offset to 1: it was missing in the files of the first models, and CompVis'
    DDIM counts its times from 1.
    """
    return replace(scheduling, offset=1) if name.startswith("StableDiffusion") else scheduling


def scheduling_to_diffusers(scheduling: Scheduling) -> dict[str, Any]:
    """Convert to the options of diffusers' schedulers, or to the fields of `Scheduling`."""
    schedule, prediction = make_schedule(scheduling.schedule).config, scheduling.prediction
    check_prediction(prediction)
    if schedule.name in BETA_SCHEDULES and prediction in PREDICTION_TYPES:
        return {
            "_class_name": CLASSES.get(scheduling.sampler, "DDIMScheduler"),  # which supports all schedules of betas
            "beta_schedule": BETA_SCHEDULES[schedule.name],
            "clip_sample": False,
            "num_train_timesteps": schedule.timesteps,
            "prediction_type": PREDICTION_TYPES[prediction],
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "skip_prk_steps": True,
            "steps_offset": scheduling.offset,
            **_without_none(
                beta_start=schedule.beta_start,
                beta_end=schedule.beta_end,
                continuous=schedule.continuous or None,
                sampler=None if scheduling.sampler in CLASSES else scheduling.sampler,
                set_alpha_to_one=scheduling.ends_clean,
            ),
            **VARIANTS.get(scheduling.sampler, {}),
            **_spacing_to_diffusers(scheduling.spacing, CLASSES.get(scheduling.sampler, "DDIMScheduler")),
        }
    if (schedule.name, prediction) == ("flow", "flow"):
        return {
            "_class_name": FLOW_CLASS,
            "num_train_timesteps": schedule.timesteps,
            "shift": schedule.shift,
            **_spacing_to_diffusers(
                scheduling.spacing, FLOW_CLASS
            ),  # which diffusers ignores: its flow matching supports linspace only
        }
    fields = asdict(scheduling) | {"schedule": asdict(schedule)}
    return {"_class_name": OWN_CLASS, **fields}


def scheduling_from_diffusers(options: Mapping[str, Any]) -> Scheduling:
    """Read scheduler_config.json of diffusers' schedulers of betas or flow matching, or of `scheduling_to_diffusers`.

    Raises:
        ValueError: an option is not supported, or its value has the wrong type.
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
        sampler=_sampler_from_diffusers(options),
    )


def _own(options: Mapping[str, Any]) -> Scheduling:
    """Read the fields of `Scheduling`."""
    schedule = options.get("schedule")
    if not isinstance(schedule, Mapping):
        raise ValueError(f"scheduler option schedule = {schedule!r} must hold the keys of ScheduleConfig")
    _check_types(schedule, get_type_hints(ScheduleConfig))
    values = {"prediction": None} | {name: value for name, value in options.items() if name != "schedule"}
    _check_types(values, get_type_hints(Scheduling))
    check_prediction(values["prediction"])
    for name, names in (("spacing", SPACINGS), ("sampler", SAMPLERS)):
        if values.get(name) is not None:
            _checked_name(name, values[name], names)
    return Scheduling(schedule=make_schedule(ScheduleConfig(**schedule)).config, **values)


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
    beta_schedule, start, end = OTHER_BETAS.get(options.get("_class_name"), BETAS)
    name = _translate("beta_schedule", options.get("beta_schedule", beta_schedule), BETA_SCHEDULES)
    return ScheduleConfig(
        name=name,
        timesteps=options.get("num_train_timesteps", 1000),
        beta_start=None if name == "cosine" else options.get("beta_start", start),
        beta_end=None if name == "cosine" else options.get("beta_end", end),
        zero_terminal_snr=options.get("rescale_betas_zero_snr", False),
        continuous=options.get("continuous", False),
    )


def _sampler_from_diffusers(options: Mapping[str, Any]) -> str | None:
    """The name of the sampler in SAMPLERS; None if it is not supported."""
    if (name := options.get("sampler")) is not None:
        return _checked_name("sampler", name, SAMPLERS)
    names = [name for name, diffusers_class in CLASSES.items() if diffusers_class == options.get("_class_name")]
    for option, default in VARIANTS.get(names[0], {}).items() if names else ():
        value, supported = options.get(option, default), {VARIANTS[name][option] for name in names}
        names = [name for name in names if VARIANTS[name][option] == value]
        if not names:
            words = " and ".join(repr(value) for value in sorted(supported))
            raise ValueError(f"scheduler option {option} = {value!r} is not implemented; only {words} are")
    return names[0] if names else None


def _spacing_to_diffusers(spacing: str | None, kind: str) -> dict[str, Any]:
    """The options of a spacing. Some are switches beside timestep_spacing, which some classes of diffusers lack."""
    if spacing in SWITCHES and kind in WITHOUT_SWITCHES:
        return {"timestep_spacing": "trailing", "spacing": spacing}
    if spacing in SWITCHES:
        return {"timestep_spacing": "linspace", SWITCHES[spacing]: True}
    if spacing in DIFFUSERS_SPACINGS:
        return {"timestep_spacing": spacing}
    return _without_none(spacing=spacing)


def _spacing_from_diffusers(options: Mapping[str, Any]) -> str | None:
    if (name := options.get("spacing")) is not None:
        return _checked_name("spacing", name, SPACINGS)
    for name, switch in SWITCHES.items():
        if options.get(switch):
            return name
    spacing = None if options.get("_class_name") in WITHOUT_SPACING else options.get("timestep_spacing")
    names = {name: name for name in DIFFUSERS_SPACINGS}
    return None if spacing is None else _translate("timestep_spacing", spacing, names)


def _checked_name(option: str, value: str, names: Mapping[str, Any]) -> str:
    """The value of an option, if it is a known name. Raises ValueError otherwise."""
    if value not in names:
        raise ValueError(f"scheduler option {option} = {value!r} is unknown; use one of {', '.join(names)}")
    return value


def _without_none(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_fixed(options: Mapping[str, Any]) -> None:
    """Raise ValueError for values that are not supported, of options that the scheduler's class reads."""
    for name, value in ({"trained_betas": None} | FIXED.get(options.get("_class_name"), {})).items():
        option = options.get(name, value)
        if option != value:
            raise ValueError(f"scheduler option {name} = {option!r} is not implemented; only {value!r} is")


def _translate(option: str, value: str, names: Mapping[str, str]) -> str:
    """The name in Stipple for diffusers' value of a scheduler option."""
    for name, diffusers_name in names.items():
        if diffusers_name == value:
            return name
    raise ValueError(f"scheduler option {option} = {value!r} is not implemented; only {', '.join(names.values())} are")
