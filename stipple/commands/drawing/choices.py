"""What `--sampler help`, `--guidance-method help` and `--spacing help` print: the choices, and when to use which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stipple.commands.drawing.open_model import find_checkpoint

RECOMMENDED = {  # the first three to try, and what for; docs/samplers.md has the measurements
    "sampler": {
        "unipc": "the most accurate in 10 to 30 steps",
        "euler_ancestral": "draws new noise at each step: other pictures, in 30 steps or more",
        "lcm": "for models distilled to a few steps: 2 to 8",
    },
    "guidance_method": {
        "classifier_free": "for every model; scale 2 to 10",
        "apg": "high scales without burnt colors; scale 5 to 20",
        "perturbed_attention": "more structure, also for models without prompts; 1.5 times the computation",
    },
    "spacing": {
        "ays": "the best for 10 to 30 steps",
        "trailing": "the best below 10 steps",
        "log_snr": "the most accurate above 30 steps",
    },
}
WIDTH = 21


def asked_for_help(arguments: Any) -> list[str]:
    """Return the flags whose value is `help`."""
    return [name for name in RECOMMENDED if getattr(arguments, name) == "help"]


def list_choices(name: str, checkpoint: str | None) -> str:
    """Return the choices for a flag: the recommended ones, then all others; the default of a model has a `*`."""
    summaries, default = _summaries(name), defaults_of(find_checkpoint(checkpoint, None)).get(name)
    mark = {choice: "*" if choice == default else "" for choice in summaries}
    lines = ["recommended:"]
    for choice, purpose in RECOMMENDED[name].items():
        lines += [f"  {choice + mark[choice]:{WIDTH}}{purpose}", f"  {'':{WIDTH}}{summaries[choice]}"]
    lines += ["all others:"]
    others = {choice: text for choice, text in summaries.items() if choice not in RECOMMENDED[name]}
    lines += [f"  {choice + mark[choice]:{WIDTH}}{text}" for choice, text in others.items()]
    model = f"of {checkpoint}" if checkpoint else "of the model that comes with Stipple"
    return "\n".join([*lines, f"* the default {model}" if default in mark else "the model names no default"])


def defaults_of(model: Path) -> Mapping[str, Any]:
    """Return sampler, guidance method and spacing that a model is drawn with by default; only folders name them."""
    from ldm.formats.diffusers.networks_folder import load_scheduling
    from ldm.formats.model_folder import OWN, read_index
    from ldm.samplers.registry import SAMPLERS
    from ldm.sampling.settings import Settings

    defaults = {"guidance_method": Settings().guidance_method}
    if model.is_dir():
        scheduling = load_scheduling(model)
        own = read_index(model).get(OWN) or {}
        sampler = own.get("sampler") or scheduling.sampler or Settings().sampler
        spacing = scheduling.spacing or SAMPLERS[sampler].time_defaults.spacing
        defaults |= {"sampler": sampler, "spacing": spacing}
    return defaults


def _summaries(name: str) -> dict[str, str]:
    """Return one line about each choice."""
    from ldm.guidance.registry import GUIDANCES
    from ldm.samplers.registry import SAMPLERS
    from ldm.samplers.spacing import SPACINGS

    if name == "spacing":
        return {choice: (what.__doc__ or "").splitlines()[0] for choice, what in SPACINGS.items()}
    table = SAMPLERS if name == "sampler" else GUIDANCES
    return {choice: what.summary for choice, what in table.items()}
