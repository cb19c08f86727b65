"""Sampling of a model with spatial hints, batch by batch, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from conditioning.interface.inputs import ConditionInputs
from ldm.pipeline import TextToImage


@torch.no_grad()
def draw_with_hints(model: TextToImage, hints: Tensor, together: int = 16, prompt: str = "", **settings) -> Tensor:
    """Sample images [B, 3, H, W] in [-1, 1] for hints [B, k, H, W] and a prompt, with seeds 0, 1, ..."""
    prompts, images = [prompt] * len(hints), []
    inputs = ConditionInputs(prompts=prompts, hint=hints)
    sides = {"height": hints.shape[2], "width": hints.shape[3]}
    first = 0
    for batch in model.batches(model.plan(prompts, inputs=inputs, seed=0, **sides, **settings), together):
        part = inputs.select(slice(first, first + len(batch)))
        for step in model.sample(batch, inputs=part):
            latents = step.z
        images.append(model.autoencoder.decode(latents).clamp(-1, 1))
        first += len(batch)
    return torch.cat(images)
