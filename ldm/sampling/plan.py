"""The first of three rooms that a prompt passes: the complete, checked settings of each image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from conditioning.readers.combined import files_of
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.steps import step_points
from ldm.sampling.defaults import with_default_scale
from ldm.sampling.model import Model
from ldm.sampling.prompt_checks import check_ignored_prompts, check_prompts
from ldm.sampling.settings import Settings, check_count, random_seed
from ldm.sampling.source_images import SourceImages, check_conditions, condition_inputs

STRENGTH = 0.75  # default for an image that the model is not conditioned on, as in CompVis' img2img


def plan(
    model: Model,
    prompts: Sequence[str],
    num_images: int,
    settings: Mapping[str, Any],
    has_inputs: bool = False,
) -> list[Settings]:
    """The complete settings of each image, see `TextToImage.plan`. The source files of images are read here.

    Args:
        model: makes the images.
        prompts: one or several.
        num_images: images per prompt.
        settings: fields of `Settings` that differ from the model's defaults; None is the default.
        has_inputs: the caller provides the conditioner's inputs, so that no source files are read.

    Raises:
        ValueError: settings or prompts are invalid, or this model can't use them.
    """
    check_count("num_images", num_images)
    specified = with_default_scale({name: value for name, value in settings.items() if value is not None})
    if specified.get("seed") == -1:
        specified["seed"] = random_seed()
    first = replace(model.defaults, **specified)
    first = replace(first, spacing=first.spacing or SAMPLERS[first.sampler].time_defaults.spacing)
    _check_supported(model, first)
    if not has_inputs:
        first = _with_sources(model, first, specified)
    step_points(model.sampling_times(first), model.schedule_of(first))  # raises
    check_prompts(model, first, prompts)
    check_ignored_prompts(model, first, prompts)
    order = enumerate(text for text in prompts for _ in range(num_images))
    planned = [replace(first, prompt=text, seed=first.seed + i) for i, text in order]
    for picture in planned:
        for guide in model.guides_of(picture):
            guide.check(picture)
    return planned


def batches(pictures: Sequence[Settings], size: int) -> Iterator[list[Settings]]:
    """Group neighbors that differ only in prompts and seed into batches of at most `size` images."""
    check_count("batch_size", size)
    for shared, group in itertools.groupby(pictures, _shared):
        group, largest = list(group), 1 if SAMPLERS[shared.sampler].alone else size
        for batch in (group[first : first + largest] for first in range(0, len(group), largest)):
            yield [replace(picture, batch=len(batch), place=place) for place, picture in enumerate(batch)]


def _shared(picture: Settings) -> Settings:
    """What the images of one batch have in common."""
    return replace(picture, prompt="", negative_prompt="", seed=0, batch=1, place=0)


def _with_sources(model: Model, picture: Settings, specified: Mapping[str, Any]) -> Settings:
    """Complete strength and size from the source files. Raises ValueError for files and sizes that can't be used."""
    check_conditions(model.conditioner, picture)
    sources = SourceImages.of(picture, model.files)
    if sources.image is not None and picture.strength is None:
        is_condition = "image" in model.hint_reads or "image" in model.conditioner.reads
        picture = replace(picture, strength=1.0 if is_condition or picture.mask is not None else STRENGTH)
    picture = _with_size(model, picture, sources, specified)
    has_prior = model.prior is not None
    condition_inputs(model.conditioner, [picture], sources, model.autoencoder.downsampling, has_prior)  # raises
    if model.factor > 1 and picture.back_projection is None:
        invents = picture.noise_level or picture.mask  # back projection would remove what they add
        picture = replace(picture, back_projection=0 if invents else model.conditioner.hint.back_projection)
    return picture


def _with_size(model: Model, picture: Settings, sources: SourceImages, specified: Mapping[str, Any]) -> Settings:
    """Complete height and width: as specified, or else those of the source that the image is aligned with."""
    aligned = picture.mask is not None or "image" in model.hint_reads or (picture.strength or 1.0) < 1
    source = sources.image if aligned and sources.image is not None else sources.map
    if source is None:
        for name in ("height", "width"):
            _check_side(model, name, getattr(picture, name))
    else:
        factor = model.factor if source is sources.image else 1
        sides = {"height": source.height * factor, "width": source.width * factor}
        picture = replace(picture, **{name: specified.get(name, side) for name, side in sides.items()})
    if min(picture.height, picture.width) < 1:
        raise ValueError(f"a picture of {picture.width} x {picture.height} pixels has none; use 1 or more")
    return picture


def _check_side(model: Model, name: str, side: int) -> None:
    f = model.autoencoder.downsampling
    if side < f or side % f:
        low = side // f * f
        fix = f"{low} or {low + f}" if low > 0 else f"{f} or more"
        raise ValueError(f"{name} {side} is not a multiple of {f} (autoencoder downsampling); use {fix}")


def _check_supported(model: Model, picture: Settings) -> None:
    """Raise ValueError for settings that this model does not support."""
    if picture.variance == "learned" and not model.learned_variance:
        raise ValueError("variance learned needs a model that learned it; use small or large")
    if picture.guidance_method == "autoguidance" and model.weaker is None:
        raise ValueError("guidance method autoguidance needs a weaker model: guide_by, or --guidance-model")
    if model.reads_scale and picture.guidance_method != "classifier_free":
        rule = "does not go with this model, which was distilled from classifier_free; leave it out"
        raise ValueError(f"guidance method {picture.guidance_method} {rule}")
    files_of(model.conditioner)  # raises
    if len(picture.prompts()) > 1 and model.conditioner.context_dim is None:
        raise ValueError(f"also {picture.also!r} is for models that read prompts; leave it out")
