"""Stage 2: train a latent UNet that reads captions (Rombach et al. 2022, sections 3.2 and 3.3).

accelerate launch train_ldm.py --config configs/ldm/emoji.yaml data.folder=PATH autoencoder=runs/emoji-autoencoder/model
accelerate launch train_ldm.py init_from=sd-v1-5.safetensors data.folder=PATH
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from autoencoder import Autoencoder, Posterior
from conditioning.classes import ClassConditioner
from conditioning.conditioner import AnyConditioner, Conditioner, ConditionerConfig, build_conditioner
from conditioning.context import Context, drop_context
from kernels.winograd import lay_out
from ldm.denoiser import Denoiser
from ldm.densities import DensityConfig, Importance, make_density
from ldm.interop import empty_unet
from ldm.loss import check_weighting, diffusion_loss
from ldm.parts import Parts, open_model, purpose
from ldm.pipeline import TextToImage
from ldm.schedule import ScheduleConfig, make_schedule
from ldm.scheduling import Scheduling
from ldm.settings import Settings
from ldm.unet import UNet, UNetConfig
from storage.config import load_config, one_line_errors, require_same, save_config, to_dict
from storage.dataset import (
    Batch,
    DataConfig,
    ImageDataset,
    Order,
    Record,
    Sample,
    Skip,
    collate,
    make_loader,
    scan,
    write_skipped,
)
from storage.folder import fingerprint
from storage.images import grid
from storage.randomness import generator, normal, uniform
from storage.shards import CachedBatch, CachedLatents, cached_collate
from storage.weights import place
from training.ema import Ema, EmaConfig
from training.optimizer import OptimizerConfig
from training.trainer import Trainer, TrainerConfig

DEFAULT_SAMPLES = ("sampler", "steps", "guidance_scale")  # fields of SamplesConfig that a model has defaults for


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What is learned."""

    prediction: str = "noise"  # what the network outputs: noise, clean, velocity, flow, score or edm
    weighting: str = "simple"  # of the squared error over noise levels: simple, min_snr, vlb, p2, edm or sigmoid
    gamma: float | None = None  # of min_snr, p2 and sigmoid; null: the paper's
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    density: DensityConfig = field(default_factory=DensityConfig)  # how often each time is drawn

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"diffusion.caption_dropout {self.caption_dropout} is a share; use 0 to 1, often 0.1")
        check_weighting(self.weighting, self.gamma)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """The pictures drawn while training, and the settings that the finished model has by default."""

    every: int = 1000  # optimizer steps; 0: never
    prompts: list[str] = field(default_factory=list)  # fixed; empty: the captions of some held-out images
    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 5.0


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on held-out images, level by level."""

    every: int = 1000  # optimizer steps; 0: never
    images: int = 64  # held-out images, at most
    levels: int = 10  # noise levels, evenly spaced in t

    def __post_init__(self):
        if self.levels < 1:
            raise ValueError(f"validation.levels {self.levels} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A stage-2 run; cache_latents.py reads the same file."""

    run: str = "runs/ldm"  # folder of everything this run writes
    seed: int = 0  # of every draw
    init_from: str | None = None  # model folder or single file to go on from; what is not said here is as it is there
    data: DataConfig
    autoencoder: str  # model folder of stage 1, any diffusers model folder, or a single file; default: init_from
    cache: str | None = None  # folder that cache_latents.py fills; null: encode images while training
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)  # default: that of init_from
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 30 % more time
    save_precision: Literal["fp32", "fp16"] = "fp32"  # of the model folder


def open_source(path: str) -> Parts:
    """The model that init_from names. Raises as `open_model`, saying who takes what a single file may need besides."""
    try:
        return open_model(path)
    except (ValueError, FileNotFoundError) as error:
        if not any(word in str(error) for word in ("YAML", "tokenizer")):
            raise
        mend = "convert_checkpoint.py takes --yaml, --tokenizer and --prediction, and makes a folder for init_from"
        raise ValueError(f"{error} ({mend})") from None


def inherited(values: dict[str, Any]) -> dict[str, Any]:
    """What a run takes from the model that it goes on from, as the lowest layer of its config."""
    path = values.get("init_from")
    if not isinstance(path, str):
        return {}
    parts = open_source(path)
    if parts.extra_channels or not isinstance(parts.conditioner, Conditioner | ClassConditioner):
        told = purpose(parts) if parts.extra_channels or parts.conditioner is None else "it reads no prompts"
        raise ValueError(f"init_from {path} can't be trained on captions: {told}")
    return {
        "autoencoder": path,
        "data": {"image_size": parts.unet.config.sample_size * parts.autoencoder.downsampling},
        "unet": to_dict(parts.unet.config),
        "diffusion": {
            "prediction": parts.scheduling.prediction,
            "schedule": to_dict(make_schedule(parts.scheduling.schedule).config),
        },
        "samples": {name: getattr(parts.settings, name) for name in DEFAULT_SAMPLES},
    }


def opened(config: RunConfig) -> Parts | None:
    """The model that a run goes on from, if there is one."""
    return None if config.init_from is None else open_source(config.init_from)


def make_conditioner(config: RunConfig, init: Parts | None, records: list[Record]) -> AnyConditioner:
    """The text encoder that the config names; else that of init_from, which learns on if it learnt with the UNet."""
    captions = [caption for record in records for group in record.captions for caption in group]
    if init is None or config.conditioner != ConditionerConfig():
        return build_conditioner(config.conditioner, captions, seed=config.seed)
    if isinstance(init.conditioner, ClassConditioner):
        if init.conditioner.null_class is None:
            raise ValueError(f"init_from {config.init_from} has no null class to drop captions for; give one that has")
        init.conditioner.tokenize(captions)  # a caption that is no class is to be found now
    return init.conditioner


def make_unet(config: RunConfig, init: Parts | None) -> UNet:
    """A new UNet with weights drawn by torch's generator, or one with those of init_from."""
    if init is None:
        return UNet(config.unet)
    free = ("sample_size", "dropout")
    require_same(config.unet, init.unet.config, "unet", f"init_from {config.init_from}", free)
    unet = empty_unet(config.unet)
    place(unet, init.unet.state_dict(), str(config.init_from))
    return unet


def make_scheduling(config: RunConfig, init: Parts | None) -> Scheduling:
    """How the trained model is to be sampled: on the config's noise levels, else as init_from."""
    learned = {"schedule": config.diffusion.schedule, "prediction": config.diffusion.prediction}
    return Scheduling(**learned) if init is None else dataclasses.replace(init.scheduling, **learned)


def make_defaults(config: RunConfig, init: Parts | None) -> Settings:
    """How the trained model makes pictures: by the config's samples, in all else as init_from."""
    given = Settings() if init is None else init.settings
    chosen = {name: getattr(config.samples, name) for name in DEFAULT_SAMPLES}
    eta = given.eta if config.samples.sampler == given.sampler else 0.0  # which another sampler may not take
    return dataclasses.replace(given, eta=eta, **chosen)


def cache_key(
    config: RunConfig, records: list[Record], autoencoder: Autoencoder, conditioner: Conditioner
) -> dict[str, Any]:
    """What cached latents and contexts depend on."""
    data = config.data
    return {
        "records": fingerprint(records),
        "image_size": data.image_size,
        "crop": data.crop,
        "flip": data.flip,
        "background": data.background,
        "autoencoder": autoencoder.fingerprint(),
        # a text encoder that is being trained has no contexts to keep
        "text_encoder": "trained" if conditioner.trainable else conditioner.fingerprint(),
    }


def check_shapes(config: RunConfig, autoencoder: Autoencoder, conditioner: Conditioner) -> None:
    """Raise ValueError where the UNet does not fit between autoencoder and text encoder."""
    f, size, unet = autoencoder.downsampling, config.data.image_size, config.unet
    if size % f:
        raise ValueError(f"data.image_size {size} is not divisible by {f} (autoencoder downsampling)")
    expected = {
        "in_channels": autoencoder.latent_channels,
        "out_channels": autoencoder.latent_channels,
        "sample_size": size // f,
        "cross_attention_dim": conditioner.context_dim,
    }
    for name, value in expected.items():
        if getattr(unet, name) != value:
            given = getattr(unet, name)
            raise ValueError(f"unet.{name} {given} does not fit autoencoder, image size and text encoder; use {value}")


@dataclass(frozen=True)
class Inputs:
    """Batches, cached or of images, as latents and contexts."""

    autoencoder: Autoencoder
    conditioner: Conditioner
    text_network: nn.Module  # the conditioner, wrapped for several processes where it is trained
    cache: CachedLatents | None

    @torch.no_grad()
    def posterior(self, batch: Batch | CachedBatch, device: torch.device) -> Posterior:
        """The posterior of the unit-scale latents [B, c, h, w]."""
        if isinstance(batch, CachedBatch):
            return Posterior.from_moments(batch.moments.to(device, non_blocking=True))
        return self.autoencoder.encode(batch.images.to(device, non_blocking=True))

    def contexts(self, batch: Batch | CachedBatch, device: torch.device) -> tuple[Context, Context]:
        """The contexts of the captions (batch B), and of the empty caption (batch 1)."""
        if isinstance(batch, CachedBatch) and not self.conditioner.trainable:
            null = Context(tokens=self.cache.null_tokens[None], mask=self.cache.null_mask[None])
            context = Context(tokens=batch.tokens, mask=batch.mask)
            if not self.conditioner.use_mask:  # all true; without it attention has faster kernels to choose from
                context, null = Context(tokens=context.tokens), Context(tokens=null.tokens)
            return context.to(device), null.to(device)
        tokens = self.conditioner.tokenize([*batch.captions, ""])
        both = self.text_network(tokens.ids.to(device), tokens.mask.to(device))
        return both.select(slice(0, -1)), both.select(-1)


@torch.no_grad()
def validate(trainer: Trainer, denoiser: Denoiser, held_out: ImageDataset, inputs: Inputs, config: RunConfig) -> None:
    """The loss on held-out images at evenly spaced noise levels, with the same noise each time; shared by processes."""
    levels, count = config.validation.levels, min(config.validation.images, len(held_out))
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
        noise = normal(config.seed, "validation noise", index, range(levels), z_0.shape[1:]).to(trainer.device)
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
        importance.learn(uniform(seed, "t", trainer.step, range(len(seen))), trainer.sum(seen))
        seen.zero_()


def draw_samples(trainer: Trainer, model: TextToImage, prompts: list[str], config: RunConfig) -> None:
    """A captioned grid of the fixed prompts, on the main process."""
    pictures = model(prompts, seed=config.seed)
    path = Path(config.run) / "samples" / f"step-{trainer.step + 1:07d}.png"
    path.parent.mkdir(exist_ok=True)
    grid(pictures, min(8, len(pictures)), prompts).save(path)


def train(config: RunConfig) -> None:
    """Train, and leave the model in `run/model`."""
    with one_line_errors():
        records = scan(config.data)
        trainer = Trainer(config.trainer, config.run, to_dict(config))
        device, seed = trainer.device, config.seed
        autoencoder = Autoencoder.load(config.autoencoder).eval().requires_grad_(False)
        init = opened(config)
        conditioner = make_conditioner(config, init, records.train)
        check_shapes(config, autoencoder, conditioner)
        cache = None
        if config.cache is not None:
            cache = CachedLatents(config.cache, cache_key(config, records.train, autoencoder, conditioner), seed)
            undecodable = sorted(cache.unusable)
            records.skipped.extend(Skip(records.train[i].name, "not decoded by cache_latents.py") for i in undecodable)
        trainer.print(
            f"{len(records.train)} images, {len(records.validation)} held out, {len(records.skipped)} skipped"
            + f" (reasons in {config.run}/skipped.jsonl)" * bool(records.skipped)
        )
        dataset = cache or ImageDataset(records.train, config.data, seed, on_skip=f"{config.run}/skipped.jsonl")
        held_out_data = dataclasses.replace(config.data, crop="center", flip=False, max_bad_fraction=1.0)
        held_out = ImageDataset(records.validation, held_out_data, seed, on_skip=f"{config.run}/skipped.jsonl")
        samples = config.samples
        defaults, scheduling = make_defaults(config, init), make_scheduling(config, init)
        schedule = make_schedule(config.diffusion.schedule)
        torch.manual_seed(seed)
        unet = lay_out(make_unet(config, init).to(device))
        del init  # whose convolutions are copies now
        unet.checkpointing = config.checkpointing
        Denoiser(unet, schedule, config.diffusion.prediction)  # refuses what is not defined, before anything is written

    lay_out(autoencoder.to(device))
    network = trainer.network("unet", unet)
    trained, text_network = [unet], conditioner.to(device)
    if conditioner.trainable:
        trained.append(conditioner)
        trainer.keep("tokenizer", conditioner.tokenizer)  # learnt from the captions, which may change between starts
        text_network = trainer.network("conditioner", conditioner)
    density = make_density(config.diffusion.density, schedule)
    seen = torch.zeros(config.trainer.batch_size, device=device)  # losses of a step, for a density that learns
    if isinstance(density, Importance):
        trainer.keep("importance", density)
    averages = [Ema(module, config.ema) for module in trained]
    optimizer = trainer.optimizer("optimizer", trained, config.optimizer, averages)
    model = TextToImage(autoencoder, unet, conditioner, scheduling, defaults)
    shown = (records.validation or records.train)[:8]
    prompts = samples.prompts or [record.captions[0][0] for record in shown]
    with one_line_errors():
        model.plan(prompts)  # a wrong number of steps is to be found now, not at the first preview
        trainer.watch("images and captions", fingerprint(records.train))
        trainer.resume()
        if trainer.is_main:
            save_config(config, f"{config.run}/config.yaml")
            write_skipped(records.skipped, f"{config.run}/skipped.jsonl")

    denoiser = Denoiser(network, schedule, config.diffusion.prediction)
    inputs = Inputs(autoencoder, conditioner, text_network, cache)

    @contextmanager
    def averaged() -> Iterator[None]:
        """Within the block the networks have the averaged weights, in evaluation mode."""
        with ExitStack() as stack:
            for average in averages:
                stack.enter_context(average.applied())
            for module in trained:
                module.eval()
            yield
            for module in trained:
                module.train()

    def save_model(folder: Path) -> None:
        with averaged():
            model.save(folder, {"fp32": None, "fp16": torch.float16}[config.save_precision])

    order = Order(
        len(dataset), config.trainer.batch_size, trainer.micro_batch_size, trainer.rank, trainer.world,
        seed, trainer.step, config.trainer.steps,
    )  # fmt: skip
    loader = make_loader(dataset, order, config.trainer.workers, cached_collate if cache else collate)
    diffusion = config.diffusion
    for batch in trainer.steps(loader, save_model):
        step, positions = trainer.step, trainer.positions()
        if config.unet.dropout:  # the one draw that is made inside a network
            torch.manual_seed(generator(seed, "dropout", step, positions[0]).initial_seed())
        posterior = inputs.posterior(batch, device)
        shape = posterior.mean.shape[1:]
        z_0 = posterior.sample(normal(seed, "posterior", step, positions, shape).to(device))
        z_0 = z_0.to(memory_format=torch.channels_last)
        noise = normal(seed, "noise", step, positions, shape).to(device, memory_format=torch.channels_last)
        t, weight = density.draw(uniform(seed, "t", step, positions))
        drop = uniform(seed, "caption dropout", step, positions) < diffusion.caption_dropout
        context = drop_context(*inputs.contexts(batch, device), drop.to(device))
        losses = diffusion_loss(denoiser, z_0, context, t, noise, diffusion.weighting, diffusion.gamma)
        loss = (losses * weight.to(losses)).mean()
        trainer.update(loss, optimizer)
        trainer.log(loss=loss)
        if isinstance(density, Importance):
            learn(trainer, density, losses, seen, seed)
        if trainer.due(config.validation.every) and len(held_out):
            with averaged():
                validate(trainer, Denoiser(unet, schedule, diffusion.prediction), held_out, inputs, config)
        if trainer.due(samples.every) and trainer.is_main:
            with averaged():
                draw_samples(trainer, model, prompts, config)
    command = shlex.join(["python", "txt2img.py", prompts[0], "--checkpoint", f"{config.run}/model"])
    trainer.print(f"the model is in {config.run}/model; next:\n  {command}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a YAML file such as configs/ldm/emoji.yaml")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks (trainer.compile=true)")
    parser.add_argument("--no-resume", action="store_true", help="begin anew in the run folder (trainer.resume=false)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as trainer.steps=1000 data.folder=PATH")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    overrides += ["trainer.compile=true"] * arguments.compile + ["trainer.resume=false"] * arguments.no_resume
    with one_line_errors():
        config = load_config(RunConfig, arguments.config, overrides, inherited)
    train(config)


if __name__ == "__main__":
    main()
