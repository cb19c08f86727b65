"""What is settled before anything is computed: a picture's complete settings, and that its model can make it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

from conditioning import ConditionInputs
from conditioning.readers.combined import files_of
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from ldm.samplers.steps import walk
from ldm.sampling.gradient_guides import GRADIENT_GUIDES, GradientGuide
from ldm.sampling.settings import Settings, random_seed, with_usual_scale
from ldm.sampling.source_images import Sources, check_read, give
from ldm.schedules.registry import Schedule, make_schedule

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

STRENGTH = (
    0.75  # of an image that the model does not read, where nobody says: the usual one of CompVis' stipple img2img
)


def plan(
    model: TextToImage, prompts: Sequence[str], num_images: int, given: ConditionInputs | None, settings: dict[str, Any]
) -> list[Settings]:
    """The complete settings of each picture, see `TextToImage.plan`."""
    if not isinstance(num_images, Integral) or num_images < 1:
        raise ValueError(f"num images {num_images!r} must be a whole number, at least 1")
    said = with_usual_scale({name: value for name, value in settings.items() if value is not None})
    if said.get("seed") == -1:
        said["seed"] = random_seed()
    first = replace(model.defaults, **said)
    first = replace(first, spacing=first.spacing or SAMPLERS[first.sampler].time_defaults.spacing)
    _check_able(model, first)
    if given is None:
        first = _of_sources(model, first, said)
    walk(walked(model, first), schedule_of(model, first))  # raises
    _check_prompts(model, first, prompts)
    _check_unread(model, first, prompts)
    order = enumerate(text for text in prompts for _ in range(num_images))
    planned = [replace(first, prompt=text, seed=first.seed + i) for i, text in order]
    for picture in planned:
        for guide in guides_of(model, picture):
            guide.check(picture)
    return planned


def batches(pictures: Sequence[Settings], size: int) -> Iterator[list[Settings]]:
    """Neighbors that differ in nothing but prompts and seed, at most `size` together."""
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f"batch size {size!r} must be a whole number, at least 1")
    for shared, alike in itertools.groupby(pictures, _shared):
        alike, most = list(alike), 1 if SAMPLERS[shared.sampler].alone else size
        for batch in (alike[first : first + most] for first in range(0, len(alike), most)):
            yield [replace(picture, batch=len(batch), place=place) for place, picture in enumerate(batch)]


def schedule_of(model: TextToImage, picture: Settings) -> Schedule:
    """The noise levels that a picture walks over: the model's, shifted where it asks for that. Raises ValueError."""
    if picture.shift is None:
        return model.schedule
    if model.schedule.config.name != "flow":
        raise ValueError(f"shift {picture.shift} is for schedule flow, not {model.schedule.config.name}; leave it out")
    return make_schedule(replace(model.schedule.config, shift=picture.shift))


def walked(model: TextToImage, picture: Settings) -> Tensor:
    """The times that a picture walks, float64 [S + 1], falling: all, or as many last steps as its strength says.

    They are steps * strength, rounded down, of those that would lead there from noise, as in CompVis' stipple img2img.

    Raises:
        ValueError: not even one step, or more steps than there are noise levels.
    """
    time_defaults, said = SAMPLERS[picture.sampler].time_defaults, model.scheduling
    schedule = schedule_of(model, picture)
    visited = times(schedule, picture.steps, picture.spacing, time_defaults, said.offset, said.ends_clean)
    strength = 1.0 if picture.strength is None else picture.strength
    taken = int(picture.steps * strength + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if not taken:
        least = f"{1 / picture.steps:.3g}"
        raise ValueError(f"strength {strength} of {picture.steps} steps is not even one; use {least} or more")
    return visited[len(visited) - 1 - taken :]


def is_blended(model: TextToImage, picture: Settings) -> bool:
    """Whether a picture is completed by `ldm.sampling.known_latents`, for a model that does not read masks."""
    return picture.mask is not None and "mask" not in hint_reads(model)


def hint_reads(model: TextToImage) -> frozenset[str]:
    """Which of image, mask, map, noise_level the model's hint is made of."""
    return frozenset() if model.conditioner.hint is None else model.conditioner.hint.reads


def reads_null(model: TextToImage, picture: Settings) -> bool:
    """Whether the negative prompt is computed."""
    guided = picture.guidance().reads_null and not model.reads_scale
    return model.is_conditional and (guided or len(picture.prompts()) > 1)


def guides_of(model: TextToImage, picture: Settings) -> list[GradientGuide]:
    """What leads a picture by a gradient. Raises ValueError where that is not there."""
    asked = {name: mend for name, mend in GRADIENT_GUIDES.items() if getattr(picture, name)}
    for name, mend in asked.items():
        if name not in model.gradient_guides:
            raise ValueError(f"{name.replace('_', ' ')} {getattr(picture, name)} needs {mend}")
    return [model.gradient_guides[name] for name in asked]


def _of_sources(model: TextToImage, picture: Settings, said: dict[str, Any]) -> Settings:
    """Strength and size where nobody says them; raises ValueError for files and sizes that can't be."""
    check_read(model.conditioner, picture)
    sources, reads = Sources.of(picture), hint_reads(model)
    if sources.image is not None and picture.strength is None:
        read = picture.mask is not None or "image" in reads or "image" in model.conditioner.reads
        picture = replace(picture, strength=1.0 if read else STRENGTH)
    seen = picture.mask is not None or "image" in reads or (picture.strength or 1.0) < 1
    shown = sources.image if seen and sources.image is not None else sources.map
    if shown is None:
        for name in ("height", "width"):
            _check_side(model, name, getattr(picture, name))
    else:
        factor = model.factor if shown is sources.image else 1
        sides = {"height": shown.height * factor, "width": shown.width * factor}
        picture = replace(picture, **{name: said.get(name, side) for name, side in sides.items()})
    if min(picture.height, picture.width) < 1:
        raise ValueError(f"a picture of {picture.width} x {picture.height} pixels has none; use 1 or more")
    give(model.conditioner, [picture], sources, model.autoencoder.downsampling, model.prior is not None)  # raises
    if model.factor > 1 and picture.back_projection is None:
        free = picture.noise_level or picture.mask  # what is asked to be invented is not to be taken back
        picture = replace(picture, back_projection=0 if free else model.conditioner.hint.back_projection)
    return picture


def _check_prompts(model: TextToImage, picture: Settings, prompts: Sequence[str]) -> None:
    """Raise ValueError for prompts that the model can't take; warn of those that are too long."""
    others = [prompt for prompt, _ in picture.prompts()[1:]]
    texts = dict.fromkeys([*prompts, *others, *([picture.negative_prompt] if reads_null(model, picture) else [])])
    model.conditioner.tokenize([*texts])  # what is no prompt to this model, no class, no layout, is found now
    for text in texts:
        if cut := model.conditioner.cut(text):
            limit = model.conditioner.max_length
            warnings.warn(f"a prompt is longer than {limit} tokens; not seen by the model: {cut!r}", stacklevel=4)


def _check_unread(model: TextToImage, picture: Settings, prompts: Sequence[str]) -> None:
    """Raise ValueError for words that nothing reads where an embedding takes the place of prompts."""
    if (model.conditioner.prompts.context_dim, model.conditioner.prompts.vector_dim) != (None, None):
        return  # tokens of them are read
    if picture.negative_prompt.strip() and reads_null(model, picture):
        mend = "guidance leads away from what it says of nothing; leave it out"
        raise ValueError(f"negative prompt {picture.negative_prompt!r:.80} is read by nothing in this model: {mend}")
    if len(picture.prompts()) > 1 and model.prior is not None:
        raise ValueError(f"also {picture.also!r:.80} is not read by a prior, which makes one embedding; leave it out")
    if picture.image is not None and any(prompt.strip() for prompt in prompts):
        told = "this model imitates the image, or draws the prompt, and can't do both"
        raise ValueError(f"prompt {max(prompts, key=len)!r:.80} and an image are given: {told}; leave one out")


def _check_able(model: TextToImage, picture: Settings) -> None:
    """Raise ValueError for what this model can't do."""
    learned = model.unet.config.out_channels > model.autoencoder.latent_channels
    if picture.variance == "learned" and not learned:
        raise ValueError("variance learned needs a model that learned it; use small or large")
    if picture.guidance_method == "autoguidance" and model.weaker is None:
        raise ValueError("guidance method autoguidance needs a weaker model: guide_by, or --guidance-model")
    if model.reads_scale and picture.guidance_method != "classifier_free":
        mend = "which this model was distilled from; leave it out"
        raise ValueError(f"guidance method {picture.guidance_method} does not go with classifier_free, {mend}")
    files_of(model.conditioner)  # raises
    if len(picture.prompts()) > 1 and model.conditioner.context_dim is None:
        raise ValueError(f"also {picture.also!r} is for models that read prompts; leave it out")


def _check_side(model: TextToImage, name: str, side: int) -> None:
    f = model.autoencoder.downsampling
    if side < f or side % f:
        low = side // f * f
        mend = f"{low} or {low + f}" if low > 0 else f"{f} or more"
        raise ValueError(f"{name} {side} is not a multiple of {f} (autoencoder downsampling); use {mend}")


def _shared(picture: Settings) -> Settings:
    """What pictures of one batch must agree on."""
    return replace(picture, prompt="", negative_prompt="", seed=0, batch=1, place=0)
