"""What is measured and shown while a denoiser is trained: the loss on held-out images, level by level, and pictures."""

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
from ldm.sampling.settings import Settings
from stipple.stages.ldm.batch_encoder import BatchEncoder
from stipple.training.trainer import Trainer
from stipple_core.data.dataset import ImageDataset, collate
from stipple_core.images.images import grid
from stipple_core.randomness import normal, uniform

SHOWN = 8  # pictures, where the config names no prompts
CHOSEN = (  # fields of Settings
    *("sampler", "spacing", "steps", "corrections"),
    *("guidance_scale", "guidance_bound", "guidance_percentile"),
)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """The pictures drawn while training, and the settings that the finished model has by default."""

    every: int = 1000  # optimizer steps; 0: never
    prompts: list[str] = field(default_factory=list)  # fixed; empty: the captions of some held-out images
    sampler: str = "ddim"
    steps: int = 50
    corrections: int | None = None  # of langevin and predictor_corrector, at each noise level; null: theirs
    guidance_scale: float = 5.0
    guidance_bound: float | None = None  # largest absolute value of estimates: 1 for pixels; null: there is no bound
    guidance_percentile: float | None = None  # dynamic thresholding to the bound, 99.5 usual; null: they are clipped

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"samples.every {self.every} must be at least 0, which is never")


@dataclass(frozen=True, kw_only=True)
class LdmValidationConfig:
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
    trainer: Trainer,
    denoiser: Denoiser,
    held_out: ImageDataset,
    inputs: BatchEncoder,
    config: LdmValidationConfig,
    seed: int,
) -> None:
    """The loss on held-out images at evenly spaced noise levels, with the same noise each time; shared by processes."""
    levels, count = config.levels, min(config.images, len(held_out))
    sums = torch.zeros(levels + 1, dtype=torch.float64, device=trainer.device)
    t = denoiser.schedule.quantize((torch.arange(levels) + 0.5) / levels)
    for index in range(trainer.rank, count, trainer.world):
        sample = held_out.held_out(index)
        if sample is None:
            continue
        batch = collate([sample])
        z_0 = inputs.posterior(batch, trainer.device).mode()
        context = inputs.contexts(batch, trainer.device)[0].repeat(levels)
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
        if not trainer.step_skipped:
            importance.learn(uniform(seed, "t", trainer.step, range(len(seen))), trainer.sum(seen))
        seen.zero_()


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """What is drawn again and again while training: prompts, and what the model reads besides, of held-out pictures."""

    prompts: Sequence[str]
    given: ConditionInputs | None = None  # None: the model reads prompts only

    @classmethod
    def of(cls, prompts: Sequence[str], examples: ImageDataset, inputs: BatchEncoder) -> SamplePrompts:
        """The config's prompts, or the captions of examples; and what goes with them of as many examples.

        Raises:
            ValueError: none of the examples can be decoded.
        """
        if not inputs.conditioner.reads:
            return cls(prompts=prompts or [record.captions[0][0] for record in examples.records[:SHOWN]])
        wanted = len(prompts) or SHOWN
        found = (examples.held_out(index) for index in range(len(examples)))
        samples = list(itertools.islice((sample for sample in found if sample is not None), wanted))
        if not samples:
            raise ValueError("no picture of those held out can be decoded to draw samples of; give data.validation")
        given = inputs.given(collate(samples))
        return cls(prompts=(prompts or given.prompts)[: len(samples)], given=given)


def draw_samples(trainer: Trainer, model: TextToImage, shown: SamplePrompts, seed: int) -> None:
    """A captioned grid, on the main process."""
    if shown.given is None:
        pictures = model(shown.prompts, seed=seed)
    else:
        pictures = []
        for place, picture in enumerate(model.plan(shown.prompts, inputs=shown.given, seed=seed)):
            *_, last = model.sample([picture], inputs=shown.given.select(slice(place, place + 1)))
            pictures += model.decode(last.z)
    grid(pictures, min(8, len(pictures)), shown.prompts).save(trainer.sample_path())


def drawing_command(model: TextToImage, prompt: str, opening: Sequence[str]) -> list[str]:
    """Return the command that draws with a model, such as `stipple draw "a red heart"` and the flags in `opening`."""
    if not model.autoencoder.decodes:
        return ["stipple", "draw", prompt, *("--checkpoint", "DECODER", "--prior"), opening[-1]]
    return [*_drawing(model, prompt), *opening]


def sampling_flags(defaults: Settings) -> list[str]:
    """Flags that say what `SamplesConfig` and a distillation choose, such as ["--sampler", "lcm", "--steps", "4"]."""
    chosen = {name: getattr(defaults, name) for name in CHOSEN if getattr(defaults, name) is not None}
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in chosen.items()}
    return [word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text)]


def _drawing(model: TextToImage, prompt: str) -> list[str]:
    if model.conditioner.hint is None and model.conditioner.reads_text:
        return ["stipple", "draw", prompt]
    if model.conditioner.hint is None:
        return ["stipple", "sample", *(["--prompt", prompt] if prompt else [])]
    return [*model.conditioner.hint.command, *([prompt] if prompt else [])]
