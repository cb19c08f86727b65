"""What a stage-1 run is told: its config, and what init_from gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoencoder import Autoencoder, AutoencoderConfig, DiscriminatorConfig
from autoencoder.linear_start import check_room
from autoencoder.losses import LossConfig
from autoencoder.perceptual import PerceptualConfig
from stages.reconstruction import ValidationConfig
from stages.settings import check_run
from storage.config import to_dict
from storage.dataset import DataConfig
from training.ema import EmaConfig
from training.optimizer import OptimizerConfig
from training.trainer import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A stage-1 run."""

    run: str = "runs/autoencoder"  # folder of everything this run writes
    seed: int = 0  # of every draw
    init_from: str | None = None  # model folder or single file whose autoencoder to go on from
    decoder_only: bool = False  # with init_from: latents stay, so that what was trained on them fits the new decoder
    linear_start: int = 0  # training pictures of which a new autoencoder begins as the linear one; 0: random weights
    latent_balance: float = 0.0  # of the finished model: 0 to 1, how far latents are to count alike in pictures (kl)
    patch: int | None = None  # train on squares of this side, cut at random from the pictures; null: on whole ones
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

    def __post_init__(self):
        check_run(self.run, self.seed)
        f = self.autoencoder.downsampling
        if self.patch is not None and not (0 < self.patch <= self.data.image_size and self.patch % f == 0):
            size = self.data.image_size
            raise ValueError(f"patch {self.patch} must be a multiple of {f} (autoencoder downsampling), at most {size}")
        if not 0 <= self.latent_balance <= 1 or (self.latent_balance and self.autoencoder.regularizer != "kl"):
            raise ValueError(f"latent_balance {self.latent_balance} must be from 0 to 1, and 0 of a codebook")
        if self.decoder_only and self.init_from is None:
            raise ValueError("decoder_only keeps the latents of an autoencoder; give init_from, or leave it out")
        if self.decoder_only and self.latent_balance:
            raise ValueError("decoder_only keeps the latents as they are, and latent_balance changes them; use one")
        if self.linear_start < 0:
            raise ValueError(f"linear_start {self.linear_start} must be at least 0, which is random weights")
        if self.linear_start and self.init_from is None:
            check_room(self.autoencoder)


def inherited(values: dict[str, Any]) -> dict[str, Any]:
    """What a run takes from the autoencoder that it goes on from, as the lowest layer of its config."""
    path = values.get("init_from")
    if not isinstance(path, str):
        return {}
    given = Autoencoder.load(path).config
    return {"autoencoder": to_dict(given), "data": {"image_size": given.sample_size}}
