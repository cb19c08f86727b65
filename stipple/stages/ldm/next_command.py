"""The command that draws with a trained model, which is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.pipeline import TextToImage
from ldm.sampling.settings import Settings
from stipple.stages.ldm.ldm_run import DEFAULT_SAMPLES

AT = DEFAULT_SAMPLES.index("sampler") + 1
CHOSEN = (*DEFAULT_SAMPLES[:AT], "spacing", *DEFAULT_SAMPLES[AT:])  # fields of Settings, in the order of their flags


def drawing_command(model: TextToImage, prompt: str, opening: Sequence[str]) -> list[str]:
    """The command that draws with a model, such as ["stipple", "draw", "a red heart"], followed by `opening` flags."""
    if not model.autoencoder.decodes:
        return ["stipple", "draw", prompt, *("--checkpoint", "DECODER", "--prior"), opening[-1]]
    return [*_drawing(model, prompt), *opening]


def sampling_flags(defaults: Settings) -> list[str]:
    """Flags for the settings that `samples` or distillation chose, such as ["--sampler", "lcm", "--steps", "4"]."""
    chosen = {name: getattr(defaults, name) for name in CHOSEN if getattr(defaults, name) is not None}
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in chosen.items()}
    return [word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text)]


def _drawing(model: TextToImage, prompt: str) -> list[str]:
    if model.conditioner.hint is None and model.conditioner.reads_text:
        return ["stipple", "draw", prompt]
    if model.conditioner.hint is None:
        return ["stipple", "sample", *(["--prompt", prompt] if prompt else [])]
    command, *files = model.conditioner.hint.command  # such as "stipple inpaint", "IMAGE.png", "MASK.png"
    return [*command.split(), *files, *([prompt] if prompt else [])]
