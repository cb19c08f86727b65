"""The config of a stage-1 run, and the defaults that it takes from `init_from`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoencoder import Autoencoder, AutoencoderConfig, DiscriminatorConfig
from autoencoder.linear_start import check_room
from autoencoder.losses.generator_loss import LossConfig
from autoencoder.losses.perceptual import PerceptualConfig
from stipple.stages.autoencoder.reconstruction import AutoencoderValidationConfig
from stipple.stages.data.run_settings import check_run
from stipple.stages.init_model import InitModel
from stipple.training.optimization.ema import EmaConfig
from stipple.training.optimization.update_rules import OptimizerConfig
from stipple.training.trainer_config import TrainerConfig
from stipple_core.config import to_dict
from stipple_core.data.records.data_config import DataConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderRunConfig:
    """The config of a stage-1 run."""

    run: str = "runs/autoencoder"  # the run folder, which everything is written to
    seed: int = 0  # of all random numbers
    init_from: str | None = None  # model folder or single file with the autoencoder to start from
    decoder_only: bool = False  # with init_from: the latents do not change, so stage-2 models of them stay usable
    linear_start: int = 0  # training images whose linear autoencoder initializes a new one; 0: random weights
    latent_balance: float = 0.0  # 0 to 1 (kl): rescale the final latents, so that errors in them affect images equally
    patch: int | None = None  # train on random square crops of this side in pixels; null: on whole images
    data: DataConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    discriminator_start: int | None = 50_001  # first optimizer step with the discriminator; null: never
    revive_every: int = 100  # vq: optimizer steps between revivals of unused codes; 0: never
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4, betas=[0.5, 0.9], weight_decay=0.0)
    )
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.999))
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: AutoencoderValidationConfig = field(default_factory=AutoencoderValidationConfig)
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 30 % more time

    def __post_init__(self):
        check_run(self.run, self.seed)
        f, size = self.autoencoder.downsampling, self.data.image_size
        if self.patch is not None and not (0 < self.patch <= size and self.patch % f == 0):
            raise ValueError(f"patch {self.patch} must be a multiple of {f} (autoencoder downsampling), at most {size}")
        if not 0 <= self.latent_balance <= 1 or (self.latent_balance and self.autoencoder.regularizer != "kl"):
            raise ValueError(f"latent_balance {self.latent_balance} must be from 0 to 1, and 0 with a codebook")
        if self.decoder_only and self.init_from is None:
            raise ValueError("decoder_only requires an autoencoder to start from; set init_from, or decoder_only=false")
        if self.decoder_only and self.latent_balance:
            raise ValueError("decoder_only keeps the latents but latent_balance changes them; use only one of the two")
        if self.linear_start < 0:
            raise ValueError(f"linear_start {self.linear_start} must be at least 0; 0 uses random weights")
        if self.linear_start and self.init_from is None:
            check_room(self.autoencoder)


def config_from_init(values: dict[str, Any], init: InitModel[Autoencoder] | None = None) -> dict[str, Any]:
    """The defaults that a run takes from the autoencoder that it starts from, as nested config values.

    Args:
        values: the config as written, with `init_from`.
        init: opens the autoencoder; None opens it for this call alone.
    """
    path = values.get("init_from")
    if not isinstance(path, str):
        return {}
    config = (init or InitModel(Autoencoder.load)).open(path).config
    return {"autoencoder": to_dict(config), "data": {"image_size": config.sample_size}}
