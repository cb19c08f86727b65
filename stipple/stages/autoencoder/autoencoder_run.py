"""What a stage-1 run is told: its config, and what init_from gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autoencoder import Autoencoder, AutoencoderConfig, DiscriminatorConfig
from autoencoder.losses.first_stage_loss import LossConfig
from autoencoder.losses.perceptual import PerceptualConfig
from stipple.stages.autoencoder.reconstruction import AutoencoderValidationConfig
from stipple.stages.data.run_settings import check_run
from stipple.training.optimization.ema import EmaConfig
from stipple.training.optimization.optimizer import OptimizerConfig
from stipple.training.trainer_config import TrainerConfig
from stipple_core.config import to_dict
from stipple_core.data.records.data_config import DataConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderRunConfig:
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
    validation: AutoencoderValidationConfig = field(default_factory=AutoencoderValidationConfig)
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 30 % more time

    def __post_init__(self):
        check_run(self.run, self.seed)


def config_from_init(values: dict[str, Any]) -> dict[str, Any]:
    """What a run takes from the autoencoder that it goes on from, as the lowest layer of its config."""
    path = values.get("init_from")
    if not isinstance(path, str):
        return {}
    given = Autoencoder.load(path).config
    return {"autoencoder": to_dict(given), "data": {"image_size": given.sample_size}}
