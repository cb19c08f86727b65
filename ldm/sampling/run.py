"""One run of a sampler: a batch of pictures, from noise or from a noised image to latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conditioning import ConditionInputs, Context
from ldm.denoising.learned_variance import LearnedVariance
from ldm.denoising.windows import Windowed
from ldm.formats.diffusers.scheduler import PREDICTION_TYPES
from ldm.guidance.base import Denoise
from ldm.guidance.registry import Ingredients, guided
from ldm.networks.cached_unet import CachedUNet
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.steps import Generators, Step, initial_noise, noised, walk
from ldm.sampling.known_latents import blended, painted_latents, resampled
from ldm.sampling.plan import guides_of, is_blended, reads_null, schedule_of, walked
from ldm.sampling.prior_sampling import sample_embeddings
from ldm.sampling.settings import Settings
from ldm.sampling.source_images import Sources, give
from ldm.schedules.registry import Schedule

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def run(
    model: TextToImage,
    batch: Sequence[Settings],
    around: Callable[[Denoise], Denoise] | None,
    given: ConditionInputs | None,
) -> Iterator[Step]:
    """The steps of B pictures to latents [B, c, h, w], see `TextToImage.sample`."""
    same, sampler = batch[0], SAMPLERS[batch[0].sampler]
    schedule, visited = schedule_of(model, same), walked(model, same)
    generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
    sources = Sources.of(same)
    if given is None:
        given = give(model.conditioner, batch, sources, model.autoencoder.downsampling, model.prior is not None)
        if model.prior is not None and sources.image is None:
            given = replace(given, embedding=sample_embeddings(model.prior, batch))
    network = _network(model, same)
    denoise = guided(same.guidance(), _ingredients(model, batch, given, schedule, visited, network))
    denoise = denoise if around is None else around(denoise)
    z = _beginning(model, same, generators, schedule, visited[0].item())
    whole = same.strength in (None, 1.0)
    if not whole or is_blended(model, same):
        known = _known(model, same, sources)
        noisy = _noised(known, generators, schedule, visited[0].item())
        if is_blended(model, same):
            painted = painted_latents(sources.mask_of(model.size(same)), model.autoencoder.downsampling).to(z.device)
            denoise = blended(denoise, known, painted)
            noisy = torch.where(painted.bool(), z, noisy) if whole else noisy
        z = noisy
    averaged = model.scheduling.prediction if model.scheduling.prediction in PREDICTION_TYPES else None  # as diffusers'
    told = {"averaged": averaged, "interpolation": getattr(network, "interpolation", None)}
    options = told | {name: getattr(same, name) for name in sampler.options if name not in told}
    options = {name: options[name] for name in sampler.options if name in told or options[name] is not None}
    sample = functools.partial(sampler.run, **options)
    if same.resample == 1:
        yield from sample(denoise, z, visited, schedule, generators)
    else:
        yield from resampled(sample, denoise, z, visited, schedule, generators, same.resample)


def _beginning(model: TextToImage, picture: Settings, generators: Generators, schedule: Schedule, t: float) -> Tensor:
    """Noise [B, c, h, w] to make a picture of."""
    time_defaults = SAMPLERS[picture.sampler].time_defaults
    shape = (len(generators), model.autoencoder.latent_channels, *model.size(picture).latents)
    noise_only = time_defaults.noise_only and picture.spacing != "leading"
    return initial_noise(shape, generators, schedule, t, noise_only).to(model.device)


def _known(model: TextToImage, picture: Settings, sources: Sources) -> Tensor:
    """The image as clean latents [1, c, h, w], float32."""
    image = sources.image_of(model.size(picture)).to(model.device, model.dtype)
    return model.autoencoder.encode(image).mode().float()


def _noised(known: Tensor, generators: Generators, schedule: Schedule, t: float) -> Tensor:
    """Clean latents [1, c, h, w] with the noise of t, one for each generator [B, c, h, w]."""
    ((begin, clean),) = walk(torch.tensor([t, 0.0], dtype=torch.float64), schedule)
    return noised(known.expand(len(generators), -1, -1, -1), clean, begin, generators)


def _ingredients(
    model: TextToImage,
    batch: Sequence[Settings],
    given: ConditionInputs,
    schedule: Schedule,
    visited: Tensor,
    network: CachedUNet | Windowed | LearnedVariance,
) -> Ingredients:
    """What the guidance of a batch is made of."""
    same, weaker = batch[0], model.weaker
    told = {"schedule": schedule, "at_levels": not SAMPLERS[same.sampler].time_defaults.fractional}
    weak = weaker and replace(weaker.denoiser, network=_network(weaker, same), **told).prepared(visited)
    members = len(batch) if model.conditioner.reads else 1  # what goes with another prompt is each picture's own
    null = None
    if reads_null(model, same):
        null = _context(model, given, [picture.negative_prompt for picture in batch], dropped=True)
    return Ingredients(
        denoiser=replace(model.denoiser, network=network, **told).prepared(visited),
        context=_context(model, given, [picture.prompt for picture in batch]),
        null=null,
        times=visited,
        weak=weak,
        others=[(_context(model, given, [prompt] * members), weight) for prompt, weight in same.prompts()[1:]],
        gradient_guides=[
            functools.partial(guide.around, pictures=batch, schedule=schedule) for guide in guides_of(model, same)
        ],
        reads_scale=model.reads_scale,
    )


def _context(
    model: TextToImage, given: ConditionInputs, prompts: Sequence[str], dropped: bool = False
) -> Context | None:
    """What the UNet is told of prompts and what is given besides, in its own dtype; None where that is nothing."""
    if not model.is_conditional:
        return None
    said = replace(given, prompts=prompts, dropped=torch.full((len(prompts),), dropped))
    return model.conditioner.encode(prompts, said).to(model.device, model.dtype)


def _network(model: TextToImage, picture: Settings) -> CachedUNet | Windowed | LearnedVariance:
    """A model's network as a denoiser of one run wants it."""
    network = CachedUNet(model.unet, picture.reuse)
    if picture.window is not None:
        overlap = picture.window // 2 if picture.overlap is None else picture.overlap
        network = Windowed(network, picture.window, overlap)
    learned = model.unet.config.out_channels > model.autoencoder.latent_channels
    return LearnedVariance(network) if learned else network
