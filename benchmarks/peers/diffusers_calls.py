"""diffusers as its documentation uses it. It imports nothing of Stipple, which would count as memory of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.shared.inputs import GUIDANCE_SCALE, PROMPT, SEED, ImageRequest, Pair

SCALE = 0.18215  # scaling factor of Stable Diffusion's latents
SAVINGS = ("slicing", "tiling", "attention slicing")  # the memory options of diffusers


def unet_call(unet: nn.Module, pair: Pair) -> Callable[[], Tensor]:
    """Return a function that runs one forward pass of a diffusers UNet."""
    return lambda: unet(pair.z_t, pair.timestep, encoder_hidden_states=pair.tokens, return_dict=False)[0]


def decode_call(vae: nn.Module, latents: Tensor) -> Callable[[], Tensor]:
    """Unit-scale latents [B, 4, h, w] to images [B, 3, H, W], as the diffusers pipelines decode them."""
    return lambda: vae.decode(latents / SCALE, return_dict=False)[0]


def encode_call(vae: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Images [B, 3, H, W] to the mean of their latents [B, 4, h, w]."""
    return lambda: vae.encode(images, return_dict=False)[0].mode() * SCALE


def save_memory(saving: str | None, vae: nn.Module, pipeline: Any = None) -> None:
    """Enable one of SAVINGS; None enables nothing."""
    if saving == "slicing":
        vae.enable_slicing()
    elif saving == "tiling":
        vae.enable_tiling()
    elif saving == "attention slicing":
        pipeline.enable_attention_slicing()


def open_pipeline(folder: Path, channels_last: bool = False, saving: str | None = None) -> Any:
    """Open a StableDiffusionPipeline with the DDIM scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    save_memory(saving, pipeline.vae, pipeline)
    return pipeline


def draw(pipeline: Any, request: ImageRequest, after_step: Callable[[], None]) -> list[Image.Image]:
    """Draw the requested images."""

    def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after_step()
        return tensors

    return pipeline(
        PROMPT,
        num_images_per_prompt=request.batch,
        height=request.size,
        width=request.size,
        guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=request.steps,
        generator=[torch.Generator("cpu").manual_seed(SEED + i) for i in range(request.batch)],
        callback_on_step_end=callback,
    ).images
