"""The second of three rooms that a prompt passes: the sampler's steps, from noise or a noised image to latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conditioning import ConditionInputs, Context
from ldm.denoising.learned_variance import LearnedVariance
from ldm.denoising.windows import Windowed
from ldm.formats.diffusers.scheduler import PREDICTION_TYPES
from ldm.guidance.classifier_free import Denoise
from ldm.guidance.registry import Ingredients, guided
from ldm.networks.cached_unet import CachedUNet
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.steps import Generators, Step, initial_noise, noised, step_points
from ldm.sampling.known_latents import blended, painted_latents, resampled
from ldm.sampling.model import Model
from ldm.sampling.settings import Settings
from ldm.sampling.source_images import SourceImages
from ldm.schedules.noise_schedule import Schedule

Network = CachedUNet | Windowed | LearnedVariance


def run(
    model: Model,
    batch: Sequence[Settings],
    inputs: ConditionInputs,
    around: Callable[[Denoise], Denoise] | None = None,
) -> Iterator[Step]:
    """Sample B images that differ only in prompts and seeds.

    Args:
        model: makes the images.
        batch: their complete settings.
        inputs: of the conditioner, for the B images; its prompts are replaced by those of the settings.
        around: wraps the guided denoiser, if it is not None.

    Yields:
        The sampler's steps; the last one holds the latents [B, c, h, w].
    """
    shared = batch[0]
    schedule, times = model.schedule_of(shared), model.sampling_times(shared)
    generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
    network = _network(model, shared)
    denoise = guided(shared.guidance(), _ingredients(model, batch, inputs, schedule, times, network))
    denoise = denoise if around is None else around(denoise)
    z = _initial_noise(model, shared, generators, schedule, times[0].item())
    if shared.strength not in (None, 1.0) or model.is_blended(shared):
        z, denoise = _from_image(model, shared, z, denoise, generators, schedule, times[0].item())
    sample = functools.partial(SAMPLERS[shared.sampler].run, **_options(model, shared, network))
    if shared.resample == 1:
        yield from sample(denoise, z, times, schedule, generators)
    else:
        yield from resampled(sample, denoise, z, times, schedule, generators, shared.resample)


def _network(model: Model, picture: Settings) -> Network:
    """The model's network, wrapped as one run requires."""
    network = CachedUNet(model.unet, picture.reuse)
    if picture.window is not None:
        overlap = picture.window // 2 if picture.overlap is None else picture.overlap
        network = Windowed(network, picture.window, overlap)
    return LearnedVariance(network) if model.learned_variance else network


def _options(model: Model, picture: Settings, network: Network) -> dict[str, object]:
    """The keyword arguments of the sampler: settings of the same names, and what depends on the model."""
    prediction = model.scheduling.prediction
    of_model = {
        "averaged": prediction if prediction in PREDICTION_TYPES else None,  # as in diffusers
        "interpolation": getattr(network, "interpolation", None),
    }
    names = SAMPLERS[picture.sampler].options
    options = {name: getattr(picture, name) for name in names if getattr(picture, name, None) is not None}
    return options | {name: value for name, value in of_model.items() if name in names}


def _initial_noise(model: Model, picture: Settings, generators: Generators, schedule: Schedule, t: float) -> Tensor:
    """The noise [B, c, h, w] that sampling begins with."""
    time_defaults = SAMPLERS[picture.sampler].time_defaults
    shape = (len(generators), model.autoencoder.latent_channels, *model.size(picture).latents)
    noise_only = time_defaults.noise_only and picture.spacing != "leading"
    return initial_noise(shape, generators, schedule, t, noise_only).to(model.device)


def _from_image(
    model: Model,
    picture: Settings,
    z: Tensor,
    denoise: Denoise,
    generators: Generators,
    schedule: Schedule,
    t: float,
) -> tuple[Tensor, Denoise]:
    """Begin at the noised source image, and keep its known part if the image has a mask."""
    sources, size = SourceImages.of(picture, model.files), model.size(picture)
    pixels = sources.image_of(size).to(model.device, model.dtype)
    known = model.autoencoder.encode(pixels).mode().float()  # [1, c, h, w]
    ((begin, clean),) = step_points(torch.tensor([t, 0.0], dtype=torch.float64), schedule)
    noisy = noised(known.expand(len(generators), -1, -1, -1), clean, begin, generators)  # [B, c, h, w]
    if model.is_blended(picture):
        painted = painted_latents(sources.mask_of(size), model.autoencoder.downsampling).to(z.device)
        denoise = blended(denoise, known, painted)
        noisy = torch.where(painted.bool(), z, noisy) if picture.strength in (None, 1.0) else noisy
    return noisy, denoise


def _ingredients(
    model: Model,
    batch: Sequence[Settings],
    inputs: ConditionInputs,
    schedule: Schedule,
    times: Tensor,
    network: Network,
) -> Ingredients:
    """What the guidance of a batch is built from."""
    shared, weaker = batch[0], model.weaker
    options = {"schedule": schedule, "at_levels": not SAMPLERS[shared.sampler].time_defaults.fractional}
    weak = weaker and replace(weaker.denoiser, network=_network(weaker, shared), **options).prepared(times)
    members = len(batch) if model.conditioner.reads else 1  # inputs besides prompts differ between images
    null = None
    if model.reads_null(shared):
        null = _context(model, inputs, [picture.negative_prompt for picture in batch], dropped=True)
    return Ingredients(
        denoiser=replace(model.denoiser, network=network, **options).prepared(times),
        context=_context(model, inputs, [picture.prompt for picture in batch]),
        null=null,
        times=times,
        weak=weak,
        others=[(_context(model, inputs, [prompt] * members), weight) for prompt, weight in shared.prompts()[1:]],
        gradient_guides=[
            functools.partial(guide.around, pictures=batch, schedule=schedule) for guide in model.guides_of(shared)
        ],
        reads_scale=model.reads_scale,
    )


def _context(model: Model, inputs: ConditionInputs, prompts: Sequence[str], dropped: bool = False) -> Context | None:
    """The UNet's context, in the UNet's dtype; None for an unconditional model."""
    if not model.is_conditional:
        return None
    inputs = replace(inputs, prompts=prompts, dropped=torch.full((len(prompts),), dropped))
    return model.conditioner.encode(prompts, inputs).to(model.device, model.dtype)
