"""From a prompt to the embedding of a picture that it could be of: how unCLIP uses its prior (Ramesh et al. 2022).

Section 2.2: of two embeddings that are drawn, the one with the larger product with the prompt's own embedding is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.sampling.settings import Settings
from stipple_core.randomness import generator

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

CANDIDATES = 2


@torch.inference_mode()
def sample_embeddings(prior: TextToImage, pictures: Sequence[Settings]) -> Tensor:
    """Embeddings [B, d] of pictures' prompts, each drawn by seeds of its own, made of the picture's."""
    return torch.stack([_best(prior, picture) for picture in pictures])


def _best(prior: TextToImage, picture: Settings) -> Tensor:
    """The best of the candidates, [d]."""
    seeds = [generator(picture.seed, "prior", candidate).initial_seed() for candidate in range(CANDIDATES)]
    planned = [each for seed in seeds for each in prior.plan(picture.prompt, seed=seed)]
    points = []
    for batch in prior.batches(planned, 1):
        *_, last = prior.sample(batch)
        points.append(prior.autoencoder.embeddings(last.z))
    points = torch.cat(points)  # [CANDIDATES, d]
    text = prior.conditioner.encode([picture.prompt]).vector  # [1, d]
    return points[(points @ text[0]).argmax()]
