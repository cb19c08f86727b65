"""A training step with diffusers: the loop of its documented train_text_to_image.py, with encoders or without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shared import models
from benchmarks.speed.training_case import Batch, Case


def their_step(case: Case, batch: Batch, model: Path, script: bool) -> Callable[[], Tensor]:
    """Return a function that runs one step of the diffusers training loop and returns the loss.

    Args:
        model: folder of the encoders.
        script: encode images and captions at each step, and average weights one by one, as the script does.
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    unet = models.randomize(models.their_unet(case.unet)).train()
    schedule = dict(beta_start=case.schedule.beta_start, beta_end=case.schedule.beta_end)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", **schedule)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2, fused=not script)
    ema = EMAModel(unet.parameters(), foreach=not script)
    encode = encoders(batch, model) if script else None

    def step() -> Tensor:
        if encode is not None:
            latents, tokens = encode()
        else:
            mean, logvar = batch.moments.chunk(2, dim=1)
            latents, tokens = mean + (logvar / 2).exp() * batch.posterior_noise, batch.tokens
        noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
        output = unet(noisy, batch.timesteps, tokens, encoder_attention_mask=batch.mask, return_dict=False)[0]
        loss = F.mse_loss(output.float(), batch.noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return loss.detach()

    return step


def encoders(batch: Batch, model: Path) -> Callable[[], tuple[Tensor, Tensor]]:
    """The batch's images and captions to latents [B, c, h, w] and tokens [B, L, d], anew at each call."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32).requires_grad_(False)
    text_encoder = _text_encoder(model).requires_grad_(False).eval()

    def encode() -> tuple[Tensor, Tensor]:
        posterior = vae.encode(batch.images).latent_dist
        latents = (posterior.mean + posterior.std * batch.posterior_noise) * vae.config.scaling_factor
        return latents, text_encoder(batch.ids, batch.mask, return_dict=False)[0]

    return encode


def _text_encoder(model: Path) -> Any:
    from transformers import AutoConfig, BertModel, CLIPTextModel

    read = dict(subfolder="text_encoder", dtype=torch.float32)
    if AutoConfig.from_pretrained(model / "text_encoder").model_type == "bert":
        return BertModel.from_pretrained(model, add_pooling_layer=False, **read)
    return CLIPTextModel.from_pretrained(model, **read)
