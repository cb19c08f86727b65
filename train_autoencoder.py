"""Stage 1: train an autoencoder on a folder of images (Rombach et al. 2022, section 3.1).

accelerate launch train_autoencoder.py --config configs/autoencoder/emoji.yaml data.folder=PATH
accelerate launch train_autoencoder.py init_from=vae-ft-mse.safetensors data.folder=PATH
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    DiscriminatorConfig,
    LatentStatistics,
    PatchDiscriminator,
    latent_rgb,
)
from autoencoder.features import FeatureDistance, train_features
from autoencoder.losses import Judgement, LossConfig, discriminator_loss, generator_loss
from autoencoder.perceptual import PerceptualConfig, make_perceptual
from autoencoder.regularizer import flatten, perplexity, revive, usage
from kernels.winograd import lay_out
from storage.config import load_config, one_line_errors, require_same, save_config, to_dict
from storage.dataset import DataConfig, ImageDataset, Order, make_loader, scan, write_skipped
from storage.folder import fingerprint
from storage.images import grid, tensor_to_image
from storage.randomness import generator, normal
from training.ema import Ema, EmaConfig
from training.evaluation import psnr, ssim
from training.optimizer import Optimizer, OptimizerConfig
from training.trainer import Trainer, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on the held-out images, and how often."""

    every: int = 1000  # optimizer steps; 0: never
    images: int = 256  # held-out images measured, at most
    grid: int = 8  # of them shown, each above its reconstruction
    scale_images: int = 4096  # training images over which the latent scale is measured at the end


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A stage-1 run."""

    run: str = "runs/autoencoder"  # folder of everything this run writes
    seed: int = 0  # of every draw
    init_from: str | None = None  # model folder or single file whose autoencoder to go on from
    data: DataConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    discriminator_start: int | None = 50_001  # optimizer step from which the discriminator exists; null: never
    revive_every: int = 100  # vq: optimizer steps between moving unused codes onto encoder outputs; 0: never
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, betas=[0.5, 0.9], weight_decay=0.0)
    )
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.999))
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 30 % more time


def inherited(values: dict[str, Any]) -> dict[str, Any]:
    """What a run takes from the autoencoder that it goes on from, as the lowest layer of its config."""
    path = values.get("init_from")
    if not isinstance(path, str):
        return {}
    given = Autoencoder.load(path).config
    return {"autoencoder": to_dict(given), "data": {"image_size": given.sample_size}}


def make_autoencoder(config: RunConfig) -> Autoencoder:
    """A new autoencoder, or that of init_from in memory of its own; its scale is measured anew at each save."""
    autoencoder = Autoencoder(config.autoencoder)
    if config.init_from is not None:
        given = Autoencoder.load(config.init_from)
        free = ("sample_size", "commitment")
        require_same(config.autoencoder, given.config, "autoencoder", f"init_from {config.init_from}", free)
        autoencoder.load_state_dict(given.state_dict(), strict=True)
    return autoencoder


class Codebook:
    """How often each code was used since the last revival, the same on every process."""

    def __init__(self, autoencoder: Autoencoder, trainer: Trainer):
        self.quantizer, self.trainer = autoencoder.quantize, trainer
        self.counts = torch.zeros(autoencoder.config.codebook_size, dtype=torch.int64, device=trainer.device)
        self.step_counts = torch.zeros_like(self.counts)  # of this process, within the optimizer step under way
        self.candidates: Tensor | None = None

    def add(self, indices: Tensor, latents: Tensor) -> None:
        """Count the codes of a micro-batch; the first one of a step gives the candidates of a revival."""
        self.step_counts += self.quantizer.counts(indices)
        if self.trainer.micro == 0:
            self.candidates = flatten(latents.detach())
        if self.trainer.last_micro:
            self.counts += self.trainer.sum(self.step_counts)
            self.step_counts.zero_()

    def revive(self, seed: int, average: Ema, optimizer: Optimizer) -> dict[str, float]:
        """Move unused codes onto outputs of the encoder, in the average too; returns usage and perplexity until now."""
        candidates = self.trainer.from_main(self.candidates.contiguous())
        measured = {"codebook_usage": usage(self.counts), "codebook_perplexity": perplexity(self.counts)}
        codes = self.quantizer.embedding.weight
        moved = revive(codes.data, self.counts, candidates, generator(seed, "revive", self.trainer.step))
        average.averages["quantize.embedding.weight"][moved] = codes.data[moved].float()
        optimizer.forget(codes, moved)
        measured["codes_revived"] = float(len(moved))
        self.counts.zero_()
        return measured

    def state_dict(self) -> dict:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.counts.copy_(state["counts"])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block gradients flow through the module, not into it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def judge(discriminator: PatchDiscriminator, images: Tensor, reconstructions: Tensor, config: LossConfig) -> Judgement:
    """The discriminator's view of the reconstructions, for the autoencoder to learn from."""
    with frozen(discriminator):
        logits, features = discriminator(reconstructions)
        if not config.feature_matching:
            return Judgement(logits, features)
        with torch.no_grad():
            return Judgement(logits, features, discriminator(images)[1])


def feature_batches(dataset: ImageDataset, config: RunConfig) -> Iterator[Tensor]:
    """Batches of training images, the same on every process, for the perceptual features to be trained on."""
    size = config.perceptual.features.batch_size
    order = Order(len(dataset), size, size, seed=config.seed)
    return (batch.images for batch in make_loader(dataset, order, config.trainer.workers))


@torch.no_grad()
def measure_scale(autoencoder: Autoencoder, dataset: ImageDataset, count: int, device: torch.device) -> Autoencoder:
    """A copy of the autoencoder whose latents are unit-scale, measured over `count` training images spread evenly."""
    autoencoder = copy.deepcopy(autoencoder).eval()
    statistics = LatentStatistics(autoencoder.latent_channels)
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    shown = []  # the first pictures, spread evenly too, for the colors of previews
    for first in range(0, len(indices), 16):
        images = torch.stack([dataset[0, index].image for index in indices[first : first + 16]]).to(device)
        posterior = autoencoder.posterior(images)
        statistics.update(posterior)
        if first % (len(indices) // 8 // 16 * 16 or 16) == 0:
            shown.append((posterior.mode(), images))
    autoencoder.set_scale(statistics.mean.float(), statistics.std)
    latents, images = (torch.cat(parts) for parts in zip(*shown, strict=True))
    latents = (latents - statistics.mean.to(latents)[:, None, None]) / statistics.std
    autoencoder.latent_rgb = latent_rgb(latents, images)
    return autoencoder


@torch.no_grad()
def validate(trainer: Trainer, autoencoder: Autoencoder, dataset: ImageDataset, config: RunConfig) -> None:
    """PSNR, SSIM and KL or codebook usage on the held-out images, shared over processes; a grid of reconstructions."""
    count = min(config.validation.images, len(dataset))
    counts = torch.zeros(autoencoder.config.codebook_size, dtype=torch.int64, device=trainer.device)
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)  # psnr, ssim, kl, images
    for index in range(trainer.rank, count, trainer.world):
        picture = dataset.picture(index)
        if picture is None:
            continue
        images = picture[None].to(trainer.device)
        reconstruction = autoencoder(images)
        again, posterior = reconstruction.images, reconstruction.posterior
        values = [psnr(images, again), ssim(images, again), posterior.kl()]
        sums += torch.cat([*values, torch.ones_like(values[0])])
        if reconstruction.indices is not None:
            counts += autoencoder.quantize.counts(reconstruction.indices)
    sums, counts = trainer.sum(sums), trainer.sum(counts)
    means = (sums / sums[-1].clamp(min=1)).tolist()
    measured = {"validation_psnr": means[0], "validation_ssim": means[1]}
    if autoencoder.config.regularizer == "vq":
        measured |= {"validation_usage": usage(counts), "validation_perplexity": perplexity(counts)}
    else:
        measured["validation_kl"] = means[2]
    trainer.record(**measured)
    trainer.print(f"step {trainer.step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    if trainer.is_main and config.validation.grid:
        pictures = (dataset.picture(index) for index in range(min(config.validation.grid, len(dataset))))
        shown = [picture for picture in pictures if picture is not None]
        again = [autoencoder(image[None].to(trainer.device)).images[0].cpu() for image in shown]
        path = Path(config.run) / "samples" / f"step-{trainer.step + 1:07d}.png"
        path.parent.mkdir(exist_ok=True)
        if shown:
            grid([tensor_to_image(image) for image in shown + again], len(shown)).save(path)


def train(config: RunConfig) -> None:
    """Train, measure, and leave the model in `run/model`."""
    with one_line_errors():
        records = scan(config.data, captioned=False)
        trainer = Trainer(config.trainer, config.run, to_dict(config))
        device, seed = trainer.device, config.seed
        trainer.print(
            f"{len(records.train)} images, {len(records.validation)} held out, {len(records.skipped)} skipped"
            + f" (reasons in {config.run}/skipped.jsonl)" * bool(records.skipped)
        )
        dataset = ImageDataset(records.train, config.data, seed, on_skip=f"{config.run}/skipped.jsonl")
        held_out_data = dataclasses.replace(config.data, crop="center", flip=False, max_bad_fraction=1.0)
        held_out = ImageDataset(records.validation, held_out_data, seed, on_skip=f"{config.run}/skipped.jsonl")
        torch.manual_seed(seed)
        autoencoder, discriminator = make_autoencoder(config), PatchDiscriminator(config.discriminator)
        lay_out(autoencoder.to(device))
        discriminator.to(memory_format=torch.channels_last)
        autoencoder.checkpointing = config.checkpointing
        f, size = autoencoder.downsampling, config.data.image_size
        if size % f:
            raise ValueError(f"data.image_size {size} is not divisible by {f} (autoencoder downsampling)")
        perceptual = make_perceptual(config.perceptual)

    network = trainer.network("autoencoder", autoencoder)
    judging_network = trainer.network("discriminator", discriminator)
    averages = [Ema(autoencoder, config.ema)]
    optimizer = trainer.optimizer("optimizer", [autoencoder], config.optimizer, averages)
    judge_optimizer = trainer.optimizer("discriminator_optimizer", [discriminator], config.optimizer)
    codebook = Codebook(autoencoder, trainer) if config.autoencoder.regularizer == "vq" else None
    if codebook is not None:
        trainer.keep("codebook", codebook)
    if perceptual is not None:
        trainer.keep("perceptual", perceptual.to(device))
    with one_line_errors():
        trainer.watch("images and captions", fingerprint(records.train))
        trainer.resume()
        if trainer.is_main:
            save_config(config, f"{config.run}/config.yaml")
            write_skipped(records.skipped, f"{config.run}/skipped.jsonl")
    if isinstance(perceptual, FeatureDistance) and trainer.step == 0:
        trainer.print(f"training the perceptual features for {config.perceptual.features.steps} steps")
        features, options = perceptual.network, config.perceptual.features
        train_features(features, feature_batches(dataset, config), options, generator(seed, "features"))
        for parameter in features.parameters():  # GPUs that differ may have trained it to other bits
            parameter.data.copy_(trainer.from_main(parameter.data))

    def save_model(folder: Path) -> None:
        last = trainer.step == config.trainer.steps
        with averages[0].applied():
            measured = measure_scale(autoencoder, dataset, config.validation.scale_images if last else 256, device)
        measured.save(folder)

    order = Order(
        len(dataset), config.trainer.batch_size, trainer.micro_batch_size, trainer.rank, trainer.world,
        seed, trainer.step, config.trainer.steps,
    )  # fmt: skip
    latent_shape = (config.autoencoder.code_channels, size // f, size // f)
    for batch in trainer.steps(make_loader(dataset, order, config.trainer.workers), save_model):
        images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)
        noise = normal(seed, "posterior", trainer.step, trainer.positions(), latent_shape).to(device)
        reconstruction = network(images, noise)
        # accelerate makes float32 of tensors that leave a network under autocast, but not of those in a dataclass
        reconstruction = dataclasses.replace(reconstruction, images=reconstruction.images.float())
        judging = config.discriminator_start is not None and trainer.step + 1 >= config.discriminator_start
        judgement = judge(discriminator, images, reconstruction.images, config.loss) if judging else None
        loss = generator_loss(images, reconstruction, config.loss, perceptual, judgement, autoencoder.last_layer)
        trainer.update(loss.total, optimizer)
        trainer.log(loss=loss.total, **{k: v for k, v in loss.scalars().items() if k != "total"})
        if judging:
            logits, _ = judging_network(torch.cat([images, reconstruction.images.detach()]))
            judge_loss = discriminator_loss(*logits.chunk(2))
            trainer.update(judge_loss, judge_optimizer)
            trainer.log(discriminator_loss=judge_loss)
        if codebook is not None:
            codebook.add(reconstruction.indices, reconstruction.posterior.mean)
            # not `due`, which is true at the last step too: codes may be unused because nobody had the time to use them
            if trainer.last_micro and config.revive_every and (trainer.step + 1) % config.revive_every == 0:
                trainer.record(**codebook.revive(seed, averages[0], optimizer))
        if trainer.due(config.validation.every) and len(held_out):
            with averages[0].applied():
                validate(trainer, autoencoder, held_out, config)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a YAML file such as configs/autoencoder/kl-f8.yaml")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks (trainer.compile=true)")
    parser.add_argument("--no-resume", action="store_true", help="begin anew in the run folder (trainer.resume=false)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as trainer.steps=1000 data.folder=PATH")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    overrides += ["trainer.compile=true"] * arguments.compile + ["trainer.resume=false"] * arguments.no_resume
    with one_line_errors():
        config = load_config(RunConfig, arguments.config, overrides, inherited)
    train(config)
    if PartialState().is_main_process:
        stem = Path(arguments.config or "").name
        ldm = f"configs/ldm/{stem}" if Path(f"configs/ldm/{stem}").is_file() else "configs/ldm/txt2img-small.yaml"
        given = [f"data.folder={config.data.folder}", f"autoencoder={config.run}/model"]
        given += [f"cache=cache/{Path(config.run).name}"]
        print(f"the autoencoder is in {config.run}/model; next:")
        print("  " + shlex.join(["accelerate", "launch", "cache_latents.py", "--config", ldm, *given]))


if __name__ == "__main__":
    main()
