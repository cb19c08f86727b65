"""The networks of a stage-1 run (autoencoder, discriminator, perceptual distance) and their training state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder import Autoencoder, PatchDiscriminator
from autoencoder.linear_start import start_linearly
from autoencoder.losses.perceptual import make_perceptual
from autoencoder.losses.trained_features import FeatureDistance, train_features
from stipple.stages.autoencoder.autoencoder_run import AutoencoderRunConfig
from stipple.stages.autoencoder.codebook_usage import Codebook
from stipple.stages.data.run_data import RunData
from stipple.training.optimization.ema import Ema
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.trainer import Trainer
from stipple_core.config import require_same
from stipple_core.data.loader import make_loader
from stipple_core.data.order import Order
from stipple_core.data.records.buckets import check_step
from stipple_core.operators.winograd import lay_out
from stipple_core.randomness import generator, uniform


@dataclass(frozen=True, kw_only=True)
class AutoencoderNetworks:
    """The networks of a stage-1 run, on their device."""

    autoencoder: Autoencoder
    discriminator: PatchDiscriminator
    perceptual: nn.Module | None  # returns a distance [B] between two batches of images


def make_autoencoder(config: AutoencoderRunConfig, init: Autoencoder | None) -> Autoencoder:
    """Build a new autoencoder, with the weights and the latent scale of `init` if there is one.

    With `decoder_only`, only the decoder and the convolution before it are trainable. Otherwise the latent scale is
    measured again at each save.
    """
    autoencoder = Autoencoder(config.autoencoder)
    if init is not None:
        free = ("sample_size", "commitment")
        require_same(config.autoencoder, init.config, "autoencoder", f"init_from {config.init_from}", free)
        autoencoder.load_state_dict(init.state_dict(), strict=True)
        autoencoder.scaling_factor, autoencoder.shift_factor = init.scaling_factor, init.shift_factor
        autoencoder.latent_rgb = init.latent_rgb
    if config.decoder_only:
        autoencoder.requires_grad_(False)
        for part in (autoencoder.decoder, autoencoder.post_quant_conv):
            part.requires_grad_(True)
    return autoencoder


def build_networks(config: AutoencoderRunConfig, init: Autoencoder | None, device: torch.device) -> AutoencoderNetworks:
    """Build the networks of the config. Raises ValueError if they can't be built or do not fit the images."""
    torch.manual_seed(config.seed)
    autoencoder, discriminator = make_autoencoder(config, init), PatchDiscriminator(config.discriminator)
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
    """The trained networks of a stage-1 run with their optimizers and average."""

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
        """Register all state with the trainer."""
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
    trainer: Trainer, perceptual: nn.Module | None, data: RunData, config: AutoencoderRunConfig
) -> None:
    """At the beginning of a run, train the features of a perceptual distance that has trainable ones."""
    if not isinstance(perceptual, FeatureDistance) or trainer.step > 0:
        return
    features, options = perceptual.network, config.perceptual.features
    trainer.print(f"training the perceptual features for {options.steps} steps")
    train_features(features, feature_batches(data, config), options, generator(config.seed, "features"))
    for parameter in features.parameters():  # different GPUs may have trained it to other bits
        parameter.data.copy_(trainer.from_main(parameter.data))


def feature_batches(data: RunData, config: AutoencoderRunConfig) -> Iterator[Tensor]:
    """Batches of training images for the perceptual features, the same on every process."""
    size = config.perceptual.features.batch_size
    order = Order(len(data.squares), size, size, seed=config.seed)
    return (batch.images for batch in make_loader(data.squares, order, config.trainer.workers))


def initialize_linearly(
    trainer: Trainer, autoencoder: Autoencoder, average: Ema, data: RunData, config: AutoencoderRunConfig
) -> None:
    """At the beginning of a run with `linear_start`, initialize as the linear autoencoder of some training images."""
    if not config.linear_start or config.init_from is not None or trainer.step > 0:
        return
    trainer.print(f"fitting the linear autoencoder of {config.linear_start} images")
    count = min(config.linear_start, len(data.squares))
    indices = torch.linspace(0, len(data.squares) - 1, count).long().tolist()
    start_linearly(autoencoder, torch.stack([data.squares[0, index].image for index in indices]))
    for parameter in autoencoder.parameters():  # different machines may have fitted it to other bits
        parameter.data.copy_(trainer.from_main(parameter.data))
    average.restart()


def crop_squares(images: Tensor, side: int | None, seed: int, step: int, positions: Sequence[int]) -> Tensor:
    """Crop a random square from each image [B, 3, H, W]: [B, 3, side, side]. None: return the whole images.

    Args:
        images: of the batch.
        side: in pixels.
        seed, step, positions: address of the random numbers, as of `uniform`.
    """
    if side is None:
        return images
    height, width = (size - side + 1 for size in images.shape[-2:])
    tops, lefts = (uniform(seed, f"patch {name}", step, positions) for name in ("top", "left"))
    corners = zip((tops * height).int().tolist(), (lefts * width).int().tolist(), strict=True)
    pairs = zip(images, corners, strict=True)
    squares = torch.stack([image[:, top : top + side, left : left + side] for image, (top, left) in pairs])
    return squares.contiguous(memory_format=torch.channels_last)
