"""The training objectives of stage 2: each is called with a batch and returns its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ldm.denoising.denoiser import Denoiser
from ldm.formats.model_parts import ModelParts
from ldm.losses.consistency import rung
from ldm.losses.diffusion_loss import diffusion_loss
from ldm.pipeline import TextToImage
from ldm.schedules.registry import make_schedule
from stipple.stages.ldm.diffusion_batch import DiffusionBatch
from stipple.stages.ldm.distillation import DISTILLATIONS
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple.training.optimization.ema import Ema
from stipple.training.trainer import Trainer
from stipple_core.config import require_same
from stipple_core.images.drawn_pictures import model_hash


class Objective(Protocol):
    """A training objective of a denoiser."""

    averages: Sequence[Ema]  # of the trained network, updated after each step, saved and restored

    def __call__(self, denoiser: Denoiser, batch: DiffusionBatch) -> Tensor:
        """Compute the losses [B] of the trained `denoiser`; their mean is minimized."""
        ...


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The denoising loss on noised data (Ho et al. 2020, algorithm 1)."""

    weighting: str
    gamma: float | None
    averages: Sequence[Ema] = ()

    def __call__(self, denoiser: Denoiser, batch: DiffusionBatch) -> Tensor:
        """Compute the losses [B], see `Objective`."""
        return diffusion_loss(denoiser, batch.z_0, batch.context, batch.t, batch.noise, self.weighting, self.gamma)


def make_objective(config: LdmRunConfig, model: TextToImage, trainer: Trainer, teacher: ModelParts | None) -> Objective:
    """Build the objective that the config names.

    Args:
        config: of the run.
        model: trained by the objective; its UNet is not wrapped yet.
        trainer: of the run.
        teacher: the model of `init_from`, opened; distillation uses its UNet.

    Raises:
        ValueError: the teacher can't be distilled, or does not fit the student.
    """
    if config.distillation is None:
        return Diffusion(weighting=config.diffusion.weighting, gamma=config.diffusion.gamma)
    if teacher.unet.config.guidance_dim is not None:
        raise ValueError(f"init_from {config.init_from} is a distilled model; set init_from to its teacher")
    where = f"its teacher {config.init_from}"
    if config.diffusion.prediction != teacher.scheduling.prediction:
        student, expected = config.diffusion.prediction, teacher.scheduling.prediction
        raise ValueError(f"diffusion.prediction {student} is not that of {where}; use {expected}, or leave it out")
    levels = make_schedule(teacher.scheduling.schedule).config
    require_same(model.schedule.config, levels, "diffusion.schedule", where)
    if config.distillation.guides and not model.is_conditional:
        low, high = config.distillation.guidance_scale
        raise ValueError(f"distillation.guidance_scale {low} to {high}: {where} is unconditional; use [1, 1]")
    levels = config.distillation.levels
    t, s = rung(model.schedule, torch.arange(1, levels + 1) / levels, levels)
    if (t == s)[1:].any():  # at the first time there is no level below
        most = model.schedule.config.timesteps
        raise ValueError(f"distillation.levels {levels} is more than {where} has noise levels; use at most {most}")
    if trainer.partitions and config.distillation.target_decay:
        raise ValueError("distillation.target_decay above 0 is not supported with FSDP; use 0")
    trainer.watch("teacher", model_hash(Path(config.init_from)))
    network = trainer.accelerator.prepare_model(teacher.unet.requires_grad_(False), evaluation_mode=True)
    denoiser = Denoiser(network, model.schedule, teacher.scheduling.prediction)
    return DISTILLATIONS[config.distillation.kind].build(config.distillation, denoiser, model.unet)
