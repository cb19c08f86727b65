"""What is learned in stage 2, each as one call that makes losses of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ldm.denoising.denoiser import Denoiser
from ldm.losses.consistency import rung
from ldm.losses.diffusion_loss import diffusion_loss
from ldm.pipeline import TextToImage
from ldm.schedules.registry import make_schedule
from stipple.stages.ldm.diffusion_batch import DiffusionBatch
from stipple.stages.ldm.distillation import DISTILLATIONS
from stipple.stages.ldm.ldm_run import LdmRunConfig, opened
from stipple.training.optimization.ema import Ema
from stipple.training.trainer import Trainer
from stipple_core.config import require_same
from stipple_core.images.drawn_pictures import model_hash


class Objective(Protocol):
    """What is learned."""

    averages: Sequence[Ema]  # of the learning network's weights, made after each update, saved and restored

    def __call__(self, denoiser: Denoiser, examples: DiffusionBatch) -> Tensor:
        """Losses [B], of which the mean is to fall; `denoiser` is what learns."""
        ...


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The data, noised: the training loss of a denoiser (Ho et al. 2020, algorithm 1)."""

    weighting: str
    gamma: float | None
    averages: Sequence[Ema] = ()

    def __call__(self, denoiser: Denoiser, examples: DiffusionBatch) -> Tensor:
        """Losses [B], see `Objective`."""
        given = examples.z_0, examples.context, examples.t, examples.noise
        return diffusion_loss(denoiser, *given, self.weighting, self.gamma)


def make_objective(config: LdmRunConfig, model: TextToImage, trainer: Trainer) -> Objective:
    """What the config asks to be learned by the model's UNet, which nothing has wrapped yet.

    Raises:
        ValueError: the teacher can't teach, or the student can't begin as its copy.
    """
    if config.distillation is None:
        return Diffusion(weighting=config.diffusion.weighting, gamma=config.diffusion.gamma)
    teacher = opened(config)
    if teacher.unet.config.guidance_dim is not None:
        raise ValueError(f"init_from {config.init_from} was distilled itself; give its teacher")
    where = f"its teacher {config.init_from}"
    if config.diffusion.prediction != teacher.scheduling.prediction:
        given, wanted = config.diffusion.prediction, teacher.scheduling.prediction
        raise ValueError(f"diffusion.prediction {given} is not that of {where}; use {wanted}, or leave it out")
    levels = make_schedule(teacher.scheduling.schedule).config
    require_same(model.schedule.config, levels, "diffusion.schedule", where)
    if config.distillation.guides and not model.is_conditional:
        low, high = config.distillation.guidance_scale
        raise ValueError(f"distillation.guidance_scale {low} to {high}: {where} is told nothing; use [1, 1]")
    levels = config.distillation.levels
    t, s = rung(model.schedule, torch.arange(1, levels + 1) / levels, levels)
    if (t == s)[1:].any():  # at the first there is nothing below
        most = model.schedule.config.timesteps
        raise ValueError(f"distillation.levels {levels} is more than {where} has noise levels; use at most {most}")
    if trainer.shards and config.distillation.target_decay:
        raise ValueError("distillation.target_decay above 0 needs whole weights, which FSDP spreads; use 0")
    trainer.watch("teacher", model_hash(Path(config.init_from)))
    network = trainer.accelerator.prepare_model(teacher.unet.requires_grad_(False), evaluation_mode=True)
    denoiser = Denoiser(network, model.schedule, teacher.scheduling.prediction)
    return DISTILLATIONS[config.distillation.kind].build(config.distillation, denoiser, model.unet)
