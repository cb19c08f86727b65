"""What is measured and shown while a denoiser is trained: the loss on held-out images, level by level, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ldm.denoiser import Denoiser
from ldm.densities import Importance
from ldm.loss import diffusion_loss
from ldm.pipeline import TextToImage
from stages.inputs import Inputs
from storage.dataset import ImageDataset, Sample, collate
from storage.images import grid
from storage.randomness import normal, uniform
from training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """The pictures drawn while training, and the settings that the finished model has by default."""

    every: int = 1000  # optimizer steps; 0: never
    prompts: list[str] = field(default_factory=list)  # fixed; empty: the captions of some held-out images
    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 5.0

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"samples.every {self.every} must be at least 0, which is never")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on held-out images, level by level."""

    every: int = 1000  # optimizer steps; 0: never
    images: int = 64  # held-out images, at most
    levels: int = 10  # noise levels, evenly spaced in t

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"validation.every {self.every} must be at least 0, which is never")
        for name in ("images", "levels"):
            value = getattr(self, name)
            if self.every and value < 1:
                raise ValueError(f"validation.{name} {value} must be at least 1; or use validation.every=0")


@torch.no_grad()
def validate(
    trainer: Trainer, denoiser: Denoiser, held_out: ImageDataset, inputs: Inputs, config: ValidationConfig, seed: int
) -> None:
    """The loss on held-out images at evenly spaced noise levels, with the same noise each time; shared by processes."""
    levels, count = config.levels, min(config.images, len(held_out))
    sums = torch.zeros(levels + 1, dtype=torch.float64, device=trainer.device)
    t = denoiser.schedule.quantize((torch.arange(levels) + 0.5) / levels)
    for index in range(trainer.rank, count, trainer.world):
        picture = held_out.picture(index)
        if picture is None:
            continue
        batch = collate([Sample(picture, held_out.records[index].captions[0][0], index)])
        z_0 = inputs.posterior(batch, trainer.device).mode()
        tokens = inputs.conditioner.tokenize(batch.captions)
        context = inputs.conditioner(tokens.ids.to(trainer.device), tokens.mask.to(trainer.device)).repeat(levels)
        noise = normal(seed, "validation noise", index, range(levels), z_0.shape[1:]).to(trainer.device)
        loss = diffusion_loss(denoiser, z_0.expand(levels, -1, -1, -1), context, t, noise)
        sums += torch.cat([loss, loss.new_ones(1)])
    sums = trainer.sum(sums)
    losses = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
    by_level = {f"validation_loss_t{level:.2f}": loss for level, loss in zip(t.tolist(), losses, strict=True)}
    trainer.record(validation_loss=sum(losses) / levels, **by_level)
    trainer.print(f"step {trainer.step + 1}: validation loss {sum(losses) / levels:.4f}")


def learn(trainer: Trainer, importance: Importance, losses: torch.Tensor, seen: torch.Tensor, seed: int) -> None:
    """Note a micro-batch's losses [B] among those of the global batch, and show them when the step is complete."""
    seen[trainer.positions()] = losses.detach().to(seen.dtype)
    if trainer.last_micro:
        if not trainer.left_out:
            importance.learn(uniform(seed, "t", trainer.step, range(len(seen))), trainer.sum(seen))
        seen.zero_()


def draw_samples(trainer: Trainer, model: TextToImage, prompts: Sequence[str], seed: int) -> None:
    """A captioned grid of the fixed prompts, on the main process."""
    pictures = model(prompts, seed=seed)
    grid(pictures, min(8, len(pictures)), prompts).save(trainer.sample_path())
