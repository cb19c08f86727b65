"""How a model is to be sampled, in the options of diffusers' schedulers, and back: what scheduler_config.json says."""

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
from ldm.schedules.base import ScheduleConfig
from ldm.schedules.registry import make_schedule

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"noise": "epsilon", "clean": "sample", "velocity": "v_prediction"}
THEIR_SPACINGS = ("trailing", "leading", "linspace")
SWITCHES = {"karras": "use_karras_sigmas", "log_snr": "use_exponential_sigmas"}  # spacings that are switches of theirs
OWN_CLASS = "Schedule"  # the class name in scheduler_config.json where diffusers has none of the kind
TYPES = {  # of the options that are read; null is what their classes write where an option has no value
    "_class_name": str | None,
    "beta_end": float | None,
    "beta_start": float | None,
    "continuous": bool,  # an option of ours, which diffusers hands on unread
    "num_train_timesteps": int,
    "rescale_betas_zero_snr": bool,
    "sampler": str | None,  # an option of ours, where diffusers has no such sampler
    "set_alpha_to_one": bool | None,
    "shift": float,
    "spacing": str | None,  # an option of ours, where diffusers has no such spacing
    "steps_offset": int,
    "use_exponential_sigmas": bool | None,
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
            "_class_name": CLASSES.get(scheduling.sampler, "DDIMScheduler"),  # which opens whatever has betas
            "beta_schedule": BETA_SCHEDULES[schedule.name],
            "clip_sample": False,
            "num_train_timesteps": schedule.timesteps,
            "prediction_type": PREDICTION_TYPES[prediction],
            "rescale_betas_zero_snr": schedule.zero_terminal_snr,
            "skip_prk_steps": True,
            "steps_offset": scheduling.offset,
            **_where_said(
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
            ),  # for us; diffusers' flow matching knows only linspace
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
        sampler=_sampler_from_diffusers(options),
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
    for name, known in (("spacing", SPACINGS), ("sampler", SAMPLERS)):
        if told.get(name) is not None:
            _known(name, told[name], known)
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
    """Ours that is theirs; None where we have none."""
    if (own := options.get("sampler")) is not None:
        return _known("sampler", own, SAMPLERS)
    found = [ours for ours, theirs in CLASSES.items() if theirs == options.get("_class_name")]
    for name, default in VARIANTS.get(found[0], {}).items() if found else ():
        said, known = options.get(name, default), {VARIANTS[ours][name] for ours in found}
        found = [ours for ours in found if VARIANTS[ours][name] == said]
        if not found:
            words = " and ".join(repr(value) for value in sorted(known))
            raise ValueError(f"scheduler option {name} = {said!r} is not implemented; only {words} are")
    return found[0] if found else None


def _spacing_to_diffusers(spacing: str | None, kind: str) -> dict[str, Any]:
    """diffusers' Karras is a switch beside the spacing, and between the ends of that; some classes lack it."""
    if spacing in SWITCHES and kind in WITHOUT_SWITCHES:
        return {"timestep_spacing": "trailing", "spacing": spacing}
    if spacing in SWITCHES:
        return {"timestep_spacing": "linspace", SWITCHES[spacing]: True}
    if spacing in THEIR_SPACINGS:
        return {"timestep_spacing": spacing}
    return _where_said(spacing=spacing)


def _spacing_from_diffusers(options: Mapping[str, Any]) -> str | None:
    if (own := options.get("spacing")) is not None:
        return _known("spacing", own, SPACINGS)
    for ours, switch in SWITCHES.items():
        if options.get(switch):
            return ours
    said = None if options.get("_class_name") in WITHOUT_SPACING else options.get("timestep_spacing")
    return None if said is None else _translate("timestep_spacing", said, {name: name for name in THEIR_SPACINGS})


def _known(option: str, said: str, known: Mapping[str, Any]) -> str:
    """What an option of ours says, if there is one of that name."""
    if said not in known:
        raise ValueError(f"scheduler option {option} = {said!r} is unknown; use one of {', '.join(known)}")
    return said


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
