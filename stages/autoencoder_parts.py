"""What a stage-1 run consists of: autoencoder, discriminator and perceptual distance, and what learns of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder import Autoencoder, PatchDiscriminator
from autoencoder.features import FeatureDistance, train_features
from autoencoder.linear_start import start_linearly
from autoencoder.perceptual import make_perceptual
from operators.winograd import lay_out
from stages.autoencoder_run import RunConfig
from stages.codebook import Codebook
from stages.pictures import Pictures
from storage.buckets import check_step
from storage.config import require_same
from storage.dataset import Order, make_loader
from storage.randomness import generator, uniform
from training.ema import Ema
from training.optimizer import Optimizer
from training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a stage-1 run, on their device."""

    autoencoder: Autoencoder
    discriminator: PatchDiscriminator
    perceptual: nn.Module | None  # a distance [B] of two batches of images


def make_autoencoder(config: RunConfig) -> Autoencoder:
    """A new autoencoder, or that of init_from in memory of its own, of which it may be that only the decoder learns."""
    autoencoder = Autoencoder(config.autoencoder)
    if config.init_from is not None:
        given = Autoencoder.load(config.init_from)
        free = ("sample_size", "commitment")
        require_same(config.autoencoder, given.config, "autoencoder", f"init_from {config.init_from}", free)
        autoencoder.load_state_dict(given.state_dict(), strict=True)
        autoencoder.scaling_factor, autoencoder.shift_factor = given.scaling_factor, given.shift_factor
        autoencoder.latent_rgb = given.latent_rgb
    if config.decoder_only:
        autoencoder.requires_grad_(False)
        for part in (autoencoder.decoder, autoencoder.post_quant_conv):
            part.requires_grad_(True)
    return autoencoder


def build_networks(config: RunConfig, device: torch.device) -> Networks:
    """The networks that the config names. Raises ValueError where they can't be made, or don't fit the images."""
    torch.manual_seed(config.seed)
    autoencoder, discriminator = make_autoencoder(config), PatchDiscriminator(config.discriminator)
    f, size = autoencoder.downsampling, config.data.image_size
    if size % f:
        raise ValueError(f"data.image_size {size} is not divisible by {f} (autoencoder downsampling)")
    check_step(config.data.buckets, f, "autoencoder downsampling")
    lay_out(autoencoder.to(device))
    autoencoder.checkpointing = config.checkpointing
    perceptual = make_perceptual(config.perceptual)
    return Networks(
        autoencoder=autoencoder,
        discriminator=discriminator.to(memory_format=torch.channels_last),
        perceptual=None if perceptual is None else perceptual.to(device),
    )


def begin_linearly(
    trainer: Trainer, autoencoder: Autoencoder, average: Ema, pictures: Pictures, config: RunConfig
) -> None:
    """Where the config asks for it, let a new run begin as the linear autoencoder of some training pictures."""
    if not config.linear_start or config.init_from is not None or trainer.step > 0:
        return
    trainer.print(f"fitting the linear autoencoder of {config.linear_start} pictures")
    count = min(config.linear_start, len(pictures.squares))
    indices = torch.linspace(0, len(pictures.squares) - 1, count).long().tolist()
    start_linearly(autoencoder, torch.stack([pictures.squares[0, index].image for index in indices]))
    for parameter in autoencoder.parameters():  # machines that differ may have fitted other bits
        parameter.data.copy_(trainer.from_main(parameter.data))
    average.restart()


def cut(images: Tensor, side: int | None, seed: int, step: int, positions: Sequence[int]) -> Tensor:
    """Squares [B, 3, side, side] of images [B, 3, H, W], at places drawn for each; None: the images as they are."""
    if side is None:
        return images
    height, width = (size - side + 1 for size in images.shape[-2:])
    tops, lefts = (uniform(seed, f"patch {name}", step, positions) for name in ("top", "left"))
    corners = zip((tops * height).int().tolist(), (lefts * width).int().tolist(), strict=True)
    pairs = zip(images, corners, strict=True)
    squares = torch.stack([image[:, top : top + side, left : left + side] for image, (top, left) in pairs])
    return squares.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class AutoencoderLearner:
    """What learns in a stage-1 run."""

    network: nn.Module  # the autoencoder, wrapped for several processes
    judging_network: nn.Module  # the discriminator, wrapped
    average: Ema  # of the autoencoder
    optimizer: Optimizer
    judge_optimizer: Optimizer
    codebook: Codebook | None  # of vq

    @classmethod
    def register(cls, trainer: Trainer, networks: Networks, config: RunConfig) -> AutoencoderLearner:
        """Give the trainer all that it is to save and restore."""
        autoencoder, discriminator = networks.autoencoder, networks.discriminator
        network = trainer.network("autoencoder", autoencoder)
        judging_network = trainer.network("discriminator", discriminator)
        average = Ema(autoencoder, config.ema)
        optimizer = trainer.optimizer("optimizer", [autoencoder], config.optimizer, [average])
        judge_optimizer = trainer.optimizer("discriminator_optimizer", [discriminator], config.optimizer)
        codebook = Codebook(autoencoder, trainer) if config.autoencoder.regularizer == "vq" else None
        if codebook is not None:
            trainer.keep("codebook", codebook)
        if networks.perceptual is not None:
            trainer.keep("perceptual", networks.perceptual)
        return cls(
            network=network, judging_network=judging_network, average=average, optimizer=optimizer,
            judge_optimizer=judge_optimizer, codebook=codebook,
        )  # fmt: skip


def train_perceptual(trainer: Trainer, perceptual: nn.Module | None, pictures: Pictures, config: RunConfig) -> None:
    """At the beginning of a run train the features that a perceptual distance compares, where they are our own."""
    if not isinstance(perceptual, FeatureDistance) or trainer.step > 0:
        return
    features, options = perceptual.network, config.perceptual.features
    trainer.print(f"training the perceptual features for {options.steps} steps")
    train_features(features, feature_batches(pictures, config), options, generator(config.seed, "features"))
    for parameter in features.parameters():  # GPUs that differ may have trained it to other bits
        parameter.data.copy_(trainer.from_main(parameter.data))


def feature_batches(pictures: Pictures, config: RunConfig) -> Iterator[Tensor]:
    """Batches of training images, the same on every process, for the perceptual features to be trained on."""
    size = config.perceptual.features.batch_size
    order = Order(len(pictures.squares), size, size, seed=config.seed)
    return (batch.images for batch in make_loader(pictures.squares, order, config.trainer.workers))
