"""Pictures by a model that is told a hint, batch by batch, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from conditioning.interface.inputs import ConditionInputs
from ldm.pipeline import TextToImage


@torch.no_grad()
def draw_with_hints(model: TextToImage, hints: Tensor, together: int = 16, prompt: str = "", **settings) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] of hints [B, k, H, W] and a prompt, with seeds from 0 on."""
    prompts, images = [prompt] * len(hints), []
    given = ConditionInputs(prompts=prompts, hint=hints)
    sides = {"height": hints.shape[2], "width": hints.shape[3]}
    first = 0
    for batch in model.batches(model.plan(prompts, inputs=given, seed=0, **sides, **settings), together):
        part = given.select(slice(first, first + len(batch)))
        for step in model.sample(batch, inputs=part):
            latents = step.z
        images.append(model.autoencoder.decode(latents).clamp(-1, 1))
        first += len(batch)
    return torch.cat(images)
