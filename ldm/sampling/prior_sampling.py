"""Image embeddings sampled from prompts by a prior, as unCLIP does it (Ramesh et al. 2022, section 2.2).

Of two sampled embeddings, the one with the larger dot product with the prompt's own embedding is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conditioning import ConditionInputs
from ldm.sampling.model import Model
from ldm.sampling.plan import batches, plan
from ldm.sampling.run import run
from ldm.sampling.settings import Settings
from ldm.sampling.source_images import SourceImages, condition_inputs
from stipple_core.randomness import generator

CANDIDATES = 2


def inputs_of(model: Model, batch: Sequence[Settings]) -> ConditionInputs:
    """The conditioner's inputs of B images that differ only in prompts and seeds, from their files or the prior.

    Raises:
        ValueError: an image that the model requires is missing.
    """
    sources, has_prior = SourceImages.of(batch[0], model.files), model.prior is not None
    inputs = condition_inputs(model.conditioner, batch, sources, model.autoencoder.downsampling, has_prior)
    if has_prior and sources.image is None:
        return replace(inputs, embedding=sample_embeddings(model.prior, batch))
    return inputs


def sample_embeddings(prior: Model, pictures: Sequence[Settings]) -> Tensor:
    """Sample embeddings [B, d] for the images' prompts, each with seeds that are derived from its own."""
    return torch.stack([_best_embedding(prior, picture) for picture in pictures])


@torch.inference_mode()
def _best_embedding(prior: Model, picture: Settings) -> Tensor:
    """The best of the candidates, [d]."""
    seeds = [generator(picture.seed, "prior", candidate).initial_seed() for candidate in range(CANDIDATES)]
    planned = [each for seed in seeds for each in plan(prior, [picture.prompt], 1, {"seed": seed})]
    points = []
    for batch in batches(planned, 1):
        *_, last = run(prior, batch, inputs_of(prior, batch))
        points.append(prior.autoencoder.embeddings(last.z))
    points = torch.cat(points)  # [CANDIDATES, d]
    text = prior.conditioner.encode([picture.prompt]).vector  # [1, d]
    return points[(points @ text[0]).argmax()]
