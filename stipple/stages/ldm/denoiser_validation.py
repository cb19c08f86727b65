"""Validation while a denoiser is trained: the loss on held-out images at each noise level, and sample images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from conditioning.interface.inputs import ConditionInputs
from ldm.denoising.denoiser import Denoiser
from ldm.losses.diffusion_loss import diffusion_loss
from ldm.losses.time_density import Importance
from ldm.pipeline import TextToImage
from stipple.stages.ldm.batch_encoder import BatchEncoder
from stipple.training.trainer import Trainer
from stipple_core.data.dataset import ImageDataset, collate
from stipple_core.images.images import grid
from stipple_core.randomness import normal, uniform

SHOWN = 8  # sample images, if the config has no prompts


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """The images drawn while training, and the default settings of the finished model."""

    every: int = 1000  # optimizer steps; 0: never
    prompts: list[str] = field(default_factory=list)  # empty: the captions of some held-out images
    sampler: str = "ddim"
    steps: int = 50
    corrections: int | None = None  # of langevin and predictor_corrector, at each noise level; null: their default
    guidance_scale: float = 5.0
    guidance_bound: float | None = None  # largest absolute value of estimates: 1 for pixels; null: no bound
    guidance_percentile: float | None = None  # dynamic thresholding to the bound, 99.5 is usual; null: clip

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"samples.every {self.every} must be at least 0; 0 is never")


@dataclass(frozen=True, kw_only=True)
class LdmValidationConfig:
    """The schedule and the size of the validation on held-out images."""

    every: int = 1000  # optimizer steps; 0: never
    images: int = 64  # held-out images, at most
    levels: int = 10  # noise levels, evenly spaced in t

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"validation.every {self.every} must be at least 0; 0 is never")
        for name in ("images", "levels"):
            value = getattr(self, name)
            if self.every and value < 1:
                raise ValueError(f"validation.{name} {value} must be at least 1; or use validation.every=0")


@torch.no_grad()
def validate(
    trainer: Trainer,
    denoiser: Denoiser,
    held_out: ImageDataset,
    encoder: BatchEncoder,
    config: LdmValidationConfig,
    seed: int,
) -> None:
    """Measure the loss on held-out images at evenly spaced noise levels, always with the same noise.

    The images are divided among the processes; every process has to call it.
    """
    levels, count = config.levels, min(config.images, len(held_out))
    sums = torch.zeros(levels + 1, dtype=torch.float64, device=trainer.device)
    t = denoiser.schedule.quantize((torch.arange(levels) + 0.5) / levels)
    for index in range(trainer.rank, count, trainer.world):
        sample = held_out.held_out(index)
        if sample is None:
            continue
        batch = collate([sample])
        z_0 = encoder.posterior(batch, trainer.device).mode()
        context = encoder.contexts(batch, trainer.device)[0].repeat(levels)
        noise = normal(seed, "validation noise", index, range(levels), z_0.shape[1:]).to(trainer.device)
        loss = diffusion_loss(denoiser, z_0.expand(levels, -1, -1, -1), context, t, noise)
        sums += torch.cat([loss, loss.new_ones(1)])
    sums = trainer.sum(sums)
    losses = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
    by_level = {f"validation_loss_t{level:.2f}": loss for level, loss in zip(t.tolist(), losses, strict=True)}
    trainer.record(validation_loss=sum(losses) / levels, **by_level)
    trainer.print(f"step {trainer.step + 1}: validation loss {sum(losses) / levels:.4f}")


def update_density(
    trainer: Trainer, importance: Importance, losses: torch.Tensor, seen: torch.Tensor, seed: int
) -> None:
    """Collect the losses [B] of a micro-batch, and update the time density when the global batch is complete."""
    seen[trainer.positions()] = losses.detach().to(seen.dtype)
    if trainer.last_micro:
        if not trainer.step_skipped:
            importance.learn(uniform(seed, "t", trainer.step, range(len(seen))), trainer.sum(seen))
        seen.zero_()


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """The prompts of the images drawn while training, and the other inputs of the model, taken from held-out images."""

    prompts: Sequence[str]
    inputs: ConditionInputs | None = None  # None: the model reads prompts only

    @classmethod
    def of(cls, prompts: Sequence[str], examples: ImageDataset, encoder: BatchEncoder) -> SamplePrompts:
        """Take the prompts of the config, or captions of examples, and the other inputs from as many examples.

        Raises:
            ValueError: no example can be decoded.
        """
        if not encoder.conditioner.reads:
            return cls(prompts=prompts or [record.captions[0][0] for record in examples.records[:SHOWN]])
        decoded = (examples.held_out(index) for index in range(len(examples)))
        samples = list(itertools.islice((sample for sample in decoded if sample is not None), len(prompts) or SHOWN))
        if not samples:
            raise ValueError(
                "no held-out image can be decoded for samples; set data.validation to hold out more images"
            )
        inputs = encoder.condition_inputs(collate(samples))
        return cls(prompts=(prompts or inputs.prompts)[: len(samples)], inputs=inputs)


def draw_samples(trainer: Trainer, model: TextToImage, samples: SamplePrompts, seed: int) -> None:
    """Save a captioned grid of sample images; only the main process calls it."""
    if samples.inputs is None:
        images = model(samples.prompts, seed=seed)
    else:
        images = []
        for index, settings in enumerate(model.plan(samples.prompts, inputs=samples.inputs, seed=seed)):
            *_, last = model.sample([settings], inputs=samples.inputs.select(slice(index, index + 1)))
            images += model.decode(last.z)
    grid(images, min(8, len(images)), samples.prompts).save(trainer.sample_path())
