"""What a run that trains a classifier of noisy latents consists of: its config, its parts, what is measured of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import Autoencoder, Pixels, open_autoencoder
from ldm.networks.classifier import Classifier, ClassifierConfig, classify, with_names
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.base import Schedule, ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple.stages.data.run_settings import check_run
from stipple.stages.ldm.denoiser_validation import LdmValidationConfig
from stipple.training.optimization.ema import Ema, EmaConfig
from stipple.training.optimization.optimizer import Optimizer, OptimizerConfig
from stipple.training.trainer import Trainer
from stipple.training.trainer_config import TrainerConfig
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Records
from stipple_core.operators.winograd import lay_out
from stipple_core.randomness import normal


@dataclass(frozen=True, kw_only=True)
class ClassifierRunConfig:
    """A run that trains a classifier."""

    run: str = "runs/classifier"  # folder of everything this run writes
    seed: int = 0  # of every draw
    data: DataConfig  # its captions are the classes
    classes: list[str] = field(default_factory=list)  # their names; empty: the distinct captions, sorted
    autoencoder: str  # whose latents it reads: that of the model to be guided, or "pixels"
    unet: UNetConfig = field(default_factory=UNetConfig)  # of which the way down and the middle are taken
    pool: str = "attention"  # or "mean"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # noise levels; best those of the model
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: LdmValidationConfig = field(default_factory=LdmValidationConfig)

    def __post_init__(self):
        check_run(self.run, self.seed)


def build_classifier(
    config: ClassifierRunConfig, records: Records, device: torch.device
) -> tuple[Classifier, Autoencoder | Pixels]:
    """A new classifier, and the autoencoder whose latents it reads. Raises ValueError where they don't fit."""
    autoencoder = open_autoencoder(config.autoencoder).eval().requires_grad_(False)
    f, channels, size = autoencoder.downsampling, autoencoder.latent_channels, config.data.image_size
    expected = {"in_channels": channels, "sample_size": size // f}
    for name, value in expected.items():
        if getattr(config.unet, name) != value:
            raise ValueError(f"unet.{name} {getattr(config.unet, name)} does not fit the autoencoder; use {value}")
    said = ClassifierConfig(
        unet=config.unet, pool=config.pool, schedule=config.schedule, autoencoder=autoencoder.fingerprint()
    )
    if config.data.maps is not None:
        raise ValueError(f"data.maps {config.data.maps} is of no use: a classifier reads no maps; leave it out")
    both = [*records.train, *records.validation]
    captions = sorted({caption for record in both for group in record.captions for caption in group})
    shape = with_names(said, config.classes or captions)
    for caption in captions:
        shape.row(caption)  # a caption that is no class is to be found now
    torch.manual_seed(config.seed)
    return lay_out(Classifier(shape).to(device)), lay_out(autoencoder.to(device))


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """What learns in such a run."""

    classifier: Classifier
    network: nn.Module  # the classifier, wrapped for several processes
    average: Ema
    optimizer: Optimizer
    schedule: Schedule

    @classmethod
    def register(cls, trainer: Trainer, classifier: Classifier, config: ClassifierRunConfig) -> ClassifierTraining:
        """Give the trainer all that it is to save and restore."""
        network = trainer.network("classifier", classifier)
        average = Ema(classifier, config.ema)
        optimizer = trainer.optimizer("optimizer", [classifier], config.optimizer, [average])
        schedule = make_schedule(config.schedule)
        return cls(classifier=classifier, network=network, average=average, optimizer=optimizer, schedule=schedule)

    @contextmanager
    def averaged(self) -> Iterator[Classifier]:
        """Within the block the classifier has the averaged weights, in evaluation mode."""
        with self.average.applied():
            self.classifier.eval()
            try:
                yield self.classifier
            finally:
                self.classifier.train()

    def rows(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """The numbers of the classes [B] that captions name."""
        return torch.tensor([self.classifier.config.row(caption) for caption in captions], device=device)

    def losses(self, z_0: Tensor, captions: Sequence[str], t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies [B] and which are right [B], of latents [B, c, h, w] noised to times t [B]."""
        alpha, sigma = (level.to(z_0).view(-1, 1, 1, 1) for level in self.schedule(t, torch.float64))
        logits = classify(self.network, self.schedule, alpha * z_0 + sigma * noise, t)
        rows = self.rows(captions, z_0.device)
        return F.cross_entropy(logits.float(), rows, reduction="none"), (logits.argmax(1) == rows).float()


@torch.no_grad()
def validate(
    trainer: Trainer,
    learner: ClassifierTraining,
    held_out: ImageDataset,
    autoencoder: Autoencoder | Pixels,
    config: LdmValidationConfig,
    seed: int,
) -> None:
    """The share of held-out images whose class is read, at evenly spaced noise levels; shared by processes."""
    levels, count = config.levels, min(config.images, len(held_out))
    sums = torch.zeros(levels + 1, dtype=torch.float64, device=trainer.device)
    t = learner.schedule.quantize((torch.arange(levels) + 0.5) / levels)
    for index in range(trainer.rank, count, trainer.world):
        sample = held_out.held_out(index)
        if sample is None:
            continue
        z_0 = autoencoder.encode(sample.image[None].to(trainer.device)).mode().expand(levels, -1, -1, -1)
        noise = normal(seed, "validation noise", index, range(levels), z_0.shape[1:]).to(trainer.device)
        _, right = learner.losses(z_0, [sample.caption] * levels, t, noise)
        sums += torch.cat([right, right.new_ones(1)])
    sums = trainer.sum(sums)
    shares = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
    by_level = {f"validation_accuracy_t{level:.2f}": share for level, share in zip(t.tolist(), shares, strict=True)}
    trainer.record(validation_accuracy=sum(shares) / levels, **by_level)
    told = ", ".join(f"{share:.2f} at t = {level:.2f}" for level, share in zip(t.tolist(), shares, strict=True))
    trainer.print(f"step {trainer.step + 1}: accuracy {told}")
