"""A run that trains a classifier of noisy latents: its config, its networks, and its validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import FirstStage, open_autoencoder
from ldm.networks.classifier import Classifier, ClassifierConfig, classify, with_names
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.noise_schedule import Schedule, ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple.stages.data.run_settings import check_run
from stipple.stages.ldm.denoiser_validation import LdmValidationConfig
from stipple.training.optimization.ema import Ema, EmaConfig
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.optimization.update_rules import OptimizerConfig
from stipple.training.trainer import Trainer
from stipple.training.trainer_config import TrainerConfig
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Records
from stipple_core.operators.winograd import lay_out
from stipple_core.randomness import normal


@dataclass(frozen=True, kw_only=True)
class ClassifierRunConfig:
    """The config of a run that trains a classifier."""

    run: str = "runs/classifier"  # the run folder, which everything is written to
    seed: int = 0  # of all random numbers
    data: DataConfig  # its captions are the classes
    classes: list[str] = field(default_factory=list)  # their names; empty: the distinct captions, sorted
    autoencoder: str  # of the model to be guided, or "pixels"; the classifier reads its latents
    unet: UNetConfig = field(default_factory=UNetConfig)  # only its down blocks and its middle block are used
    pool: str = "attention"  # or "mean"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # noise levels; best those of the guided model
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: LdmValidationConfig = field(default_factory=LdmValidationConfig)

    def __post_init__(self):
        check_run(self.run, self.seed)


def build_classifier(
    config: ClassifierRunConfig, records: Records, device: torch.device
) -> tuple[Classifier, FirstStage]:
    """Build a classifier, and open its autoencoder. Raises ValueError if they do not fit each other or the data."""
    autoencoder = open_autoencoder(config.autoencoder).eval().requires_grad_(False)
    f, channels, size = autoencoder.downsampling, autoencoder.latent_channels, config.data.image_size
    expected = {"in_channels": channels, "sample_size": size // f}
    for name, value in expected.items():
        if getattr(config.unet, name) != value:
            raise ValueError(f"unet.{name} {getattr(config.unet, name)} does not fit the autoencoder; use {value}")
    settings = ClassifierConfig(
        unet=config.unet, pool=config.pool, schedule=config.schedule, autoencoder=autoencoder.fingerprint()
    )
    if config.data.maps is not None:
        raise ValueError(
            f"data.maps {config.data.maps} has no effect, because a classifier reads no maps; leave it out"
        )
    both = [*records.train, *records.validation]
    captions = sorted({caption for record in both for group in record.captions for caption in group})
    shape = with_names(settings, config.classes or captions)
    for caption in captions:
        shape.row(caption)  # raises now for a caption that is not a class
    torch.manual_seed(config.seed)
    return lay_out(Classifier(shape).to(device)), lay_out(autoencoder.to(device))


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """The trained classifier of a run with its optimizer and average."""

    classifier: Classifier
    network: nn.Module  # the classifier, wrapped for several processes
    average: Ema
    optimizer: Optimizer
    schedule: Schedule

    @classmethod
    def register(cls, trainer: Trainer, classifier: Classifier, config: ClassifierRunConfig) -> ClassifierTraining:
        """Register all state with the trainer."""
        network = trainer.network("classifier", classifier)
        average = Ema(classifier, config.ema)
        optimizer = trainer.optimizer("optimizer", [classifier], config.optimizer, [average])
        schedule = make_schedule(config.schedule)
        return cls(classifier=classifier, network=network, average=average, optimizer=optimizer, schedule=schedule)

    @contextmanager
    def averaged(self) -> Iterator[Classifier]:
        """Within the block, the classifier has the averaged weights and is in evaluation mode."""
        with self.average.applied():
            self.classifier.eval()
            try:
                yield self.classifier
            finally:
                self.classifier.train()

    def rows(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """The class indices [B] of captions."""
        return torch.tensor([self.classifier.config.row(caption) for caption in captions], device=device)

    def losses(self, z_0: Tensor, captions: Sequence[str], t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies [B] and correctness [B] (0 or 1) for latents [B, c, h, w] noised to times t [B]."""
        alpha, sigma = (level.to(z_0).view(-1, 1, 1, 1) for level in self.schedule(t, torch.float64))
        logits = classify(self.network, self.schedule, alpha * z_0 + sigma * noise, t)
        rows = self.rows(captions, z_0.device)
        return F.cross_entropy(logits.float(), rows, reduction="none"), (logits.argmax(1) == rows).float()


@torch.no_grad()
def validate(
    trainer: Trainer,
    training: ClassifierTraining,
    held_out: ImageDataset,
    autoencoder: FirstStage,
    config: LdmValidationConfig,
    seed: int,
) -> None:
    """Measure the accuracy on held-out images at evenly spaced noise levels.

    The images are divided among the processes; every process has to call it.
    """
    levels, count = config.levels, min(config.images, len(held_out))
    sums = torch.zeros(levels + 1, dtype=torch.float64, device=trainer.device)
    t = training.schedule.quantize((torch.arange(levels) + 0.5) / levels)
    for index in range(trainer.rank, count, trainer.world):
        sample = held_out.held_out(index)
        if sample is None:
            continue
        z_0 = autoencoder.encode(sample.image[None].to(trainer.device)).mode().expand(levels, -1, -1, -1)
        noise = normal(seed, "validation noise", index, range(levels), z_0.shape[1:]).to(trainer.device)
        _, correct = training.losses(z_0, [sample.caption] * levels, t, noise)
        sums += torch.cat([correct, correct.new_ones(1)])
    sums = trainer.sum(sums)
    accuracies = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
    by_level = {f"validation_accuracy_t{level:.2f}": value for level, value in zip(t.tolist(), accuracies, strict=True)}
    trainer.record(validation_accuracy=sum(accuracies) / levels, **by_level)
    listed = ", ".join(f"{value:.2f} at t = {level:.2f}" for level, value in zip(t.tolist(), accuracies, strict=True))
    trainer.print(f"step {trainer.step + 1}: accuracy {listed}")
