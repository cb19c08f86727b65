"""What a stage-1 run consists of: autoencoder, discriminator and perceptual distance, and what learns of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder import Autoencoder, PatchDiscriminator
from autoencoder.losses.perceptual import make_perceptual
from autoencoder.losses.trained_features import FeatureDistance, train_features
from stipple.stages.autoencoder.autoencoder_run import AutoencoderRunConfig
from stipple.stages.autoencoder.codebook import Codebook
from stipple.stages.data.run_data import RunData
from stipple.training.optimization.ema import Ema
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.trainer import Trainer
from stipple_core.config import require_same
from stipple_core.data.loader import make_loader
from stipple_core.data.order import Order
from stipple_core.data.records.buckets import check_step
from stipple_core.operators.winograd import lay_out
from stipple_core.randomness import generator


@dataclass(frozen=True, kw_only=True)
class AutoencoderNetworks:
    """The networks of a stage-1 run, on their device."""

    autoencoder: Autoencoder
    discriminator: PatchDiscriminator
    perceptual: nn.Module | None  # a distance [B] of two batches of images


def make_autoencoder(config: AutoencoderRunConfig) -> Autoencoder:
    """A new autoencoder, or that of init_from in memory of its own; its scale is measured anew at each save."""
    autoencoder = Autoencoder(config.autoencoder)
    if config.init_from is not None:
        given = Autoencoder.load(config.init_from)
        free = ("sample_size", "commitment")
        require_same(config.autoencoder, given.config, "autoencoder", f"init_from {config.init_from}", free)
        autoencoder.load_state_dict(given.state_dict(), strict=True)
    return autoencoder


def build_networks(config: AutoencoderRunConfig, device: torch.device) -> AutoencoderNetworks:
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
    return AutoencoderNetworks(
        autoencoder=autoencoder,
        discriminator=discriminator.to(memory_format=torch.channels_last),
        perceptual=None if perceptual is None else perceptual.to(device),
    )


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """What learns in a stage-1 run."""

    network: nn.Module  # the autoencoder, wrapped for several processes
    discriminator_network: nn.Module  # the discriminator, wrapped
    average: Ema  # of the autoencoder
    optimizer: Optimizer
    discriminator_optimizer: Optimizer
    codebook: Codebook | None  # of vq

    @classmethod
    def register(
        cls, trainer: Trainer, networks: AutoencoderNetworks, config: AutoencoderRunConfig
    ) -> AutoencoderTraining:
        """Give the trainer all that it is to save and restore."""
        autoencoder, discriminator = networks.autoencoder, networks.discriminator
        network = trainer.network("autoencoder", autoencoder)
        discriminator_network = trainer.network("discriminator", discriminator)
        average = Ema(autoencoder, config.ema)
        optimizer = trainer.optimizer("optimizer", [autoencoder], config.optimizer, [average])
        discriminator_optimizer = trainer.optimizer("discriminator_optimizer", [discriminator], config.optimizer)
        codebook = Codebook(autoencoder, trainer) if config.autoencoder.regularizer == "vq" else None
        if codebook is not None:
            trainer.keep("codebook", codebook)
        if networks.perceptual is not None:
            trainer.keep("perceptual", networks.perceptual)
        return cls(
            network=network, discriminator_network=discriminator_network, average=average, optimizer=optimizer,
            discriminator_optimizer=discriminator_optimizer, codebook=codebook,
        )  # fmt: skip


def train_perceptual(
    trainer: Trainer, perceptual: nn.Module | None, pictures: RunData, config: AutoencoderRunConfig
) -> None:
    """At the beginning of a run train the features that a perceptual distance compares, where they are our own."""
    if not isinstance(perceptual, FeatureDistance) or trainer.step > 0:
        return
    features, options = perceptual.network, config.perceptual.features
    trainer.print(f"training the perceptual features for {options.steps} steps")
    train_features(features, feature_batches(pictures, config), options, generator(config.seed, "features"))
    for parameter in features.parameters():  # GPUs that differ may have trained it to other bits
        parameter.data.copy_(trainer.from_main(parameter.data))


def feature_batches(pictures: RunData, config: AutoencoderRunConfig) -> Iterator[Tensor]:
    """Batches of training images, the same on every process, for the perceptual features to be trained on."""
    size = config.perceptual.features.batch_size
    order = Order(len(pictures.squares), size, size, seed=config.seed)
    return (batch.images for batch in make_loader(pictures.squares, order, config.trainer.workers))
