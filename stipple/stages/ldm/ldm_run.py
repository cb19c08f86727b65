"""The config of a stage-2 run, which `stipple cache` reads too, and the defaults that it takes from `init_from`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from conditioning.conditioners import ConditionerConfig
from ldm.formats.diffusers.network_kinds import NetworkConfig, folder_of
from ldm.formats.model_parts import ModelParts
from ldm.formats.opening import open_model
from ldm.losses.diffusion_loss import check_weighting
from ldm.losses.time_density import DensityConfig
from ldm.networks.prior_config import PriorConfig
from ldm.networks.unet_config import UNetConfig
from ldm.sampling.defaults import default_settings, stored_names
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple.stages.data.run_settings import check_run
from stipple.stages.init_model import InitModel
from stipple.stages.ldm.denoiser_validation import LdmValidationConfig, SamplesConfig
from stipple.stages.ldm.distillation import DistillationConfig, student_samples
from stipple.stages.ldm.trainable import InversionConfig, LoraConfig
from stipple.training.optimization.ema import EmaConfig
from stipple.training.optimization.update_rules import OptimizerConfig
from stipple.training.trainer_config import TrainerConfig
from stipple_core.config import to_dict
from stipple_core.data.records.data_config import DataConfig

# fields of SamplesConfig that a model stores as its defaults
DEFAULT_SAMPLES = tuple(each.name for each in fields(SamplesConfig) if each.name in stored_names())


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The training objective of a denoiser."""

    prediction: str = "noise"  # what the network outputs: noise, clean, velocity, flow, score or edm
    weighting: str = "simple"  # of the squared error over noise levels: simple, min_snr, vlb, p2, edm, sigmoid or noise
    gamma: float | None = None  # of min_snr, p2 and sigmoid; null: the value in their paper
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    density: DensityConfig = field(default_factory=DensityConfig)  # how often each time is drawn

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"diffusion.caption_dropout {self.caption_dropout} must be from 0 to 1; 0.1 is usual")
        check_weighting(self.weighting, self.gamma)


@dataclass(frozen=True, kw_only=True)
class PreservationConfig:
    """Prior preservation: the model draws images of a class, and is trained on them together with the data."""

    folder: str  # of the class images; missing ones are drawn into it first
    prompt: str  # of the class, such as "a dog": the prompt of the images and their caption
    images: int = 100  # class images in total; the paper has 200 for each new image
    weight: float = 1.0  # of their losses, lambda in eq. 2

    def __post_init__(self):
        if self.images < 1 or not self.weight > 0:
            wrong = f"images {self.images} must be at least 1 and weight {self.weight} above 0"
            raise ValueError(f"preservation: {wrong}; 100 and 1 are usual")


@dataclass(frozen=True, kw_only=True)
class LdmRunConfig:
    """The config of a stage-2 run; `stipple cache` reads the same file."""

    run: str = "runs/ldm"  # the run folder, which everything is written to
    seed: int = 0  # of all random numbers
    init_from: str | None = None  # model folder or single file to start from; other keys default to its values
    data: DataConfig
    preservation: PreservationConfig | None = None  # train on images of the class too, so that it is not forgotten
    lora: LoraConfig | None = None  # train low-rank adapters of init_from instead of its weights
    inversion: InversionConfig | None = None  # train the embedding of a new word for init_from and nothing else
    autoencoder: str  # model folder of stage 1, any diffusers model folder, or a single file; default: init_from
    cache: str | None = None  # folder that stipple cache fills; null: encode images while training
    cache_contexts: bool = True  # also cache contexts of captions; false saves disk space (docs/scaling.md)
    cache_precision: Literal["fp32", "fp16"] = "fp32"  # of the cached moments
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)  # default: that of init_from
    unet: UNetConfig = field(default_factory=UNetConfig)
    prior: PriorConfig | None = None  # the network of a model of image embeddings, in place of unet
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    distillation: DistillationConfig | None = None  # train a student of init_from that needs fewer steps
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    validation: LdmValidationConfig = field(default_factory=LdmValidationConfig)
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, about 30 % more time
    save_precision: Literal["fp32", "fp16"] = "fp32"  # of the model folder

    def __post_init__(self):
        check_run(self.run, self.seed)
        check_distillation(self)
        check_preservation(self)

    @property
    def needs_null(self) -> bool:
        """Whether training needs null contexts: for caption dropout, or for a teacher with guidance."""
        return self.diffusion.caption_dropout > 0 or (self.distillation is not None and self.distillation.guides)

    @property
    def network(self) -> NetworkConfig:
        """The config of the network that is trained."""
        return self.prior or self.unet


def check_distillation(config: LdmRunConfig) -> None:
    """Raise ValueError if the settings do not go together with distillation, or need it."""
    distillation = config.distillation
    if distillation is None and config.unet.guidance_dim is not None:
        dim = config.unet.guidance_dim
        raise ValueError(f"unet.guidance_dim {dim} is only for distilled networks; set distillation, or use null")
    if distillation is None:
        return
    if config.init_from is None:
        raise ValueError(f"distillation.kind {distillation.kind} needs a teacher; set init_from to a trained model")
    if config.conditioner != ConditionerConfig():
        raise ValueError(f"distillation.kind {distillation.kind} keeps the conditioner of init_from; leave yours out")
    for name in ("weighting", "gamma"):
        if (value := getattr(config.diffusion, name)) != getattr(DiffusionConfig, name):
            raise ValueError(f"diffusion.{name} {value} has no effect with distillation; leave one of them out")
    if config.validation.every:
        every = config.validation.every
        raise ValueError(f"validation.every {every} measures denoising, which distillation does not lower; use 0")


def check_preservation(config: LdmRunConfig) -> None:
    """Raise ValueError if class images are requested without a model to draw them, or with a cache without them."""
    if config.preservation is None or (config.init_from is not None and config.cache is None):
        return
    wrong = "there is no init_from" if config.cache is None else f"cache is {config.cache}"
    raise ValueError(f"preservation requires init_from, whose model draws the class images, and cache=null; {wrong}")


def open_init(path: str) -> ModelParts:
    """Open the model that `init_from` names.

    Raises:
        ValueError, FileNotFoundError: as `open_model`; if a single file needs more information, the message names the
            command that takes it.
    """
    try:
        return open_model(path)
    except (ValueError, FileNotFoundError) as error:
        if not any(word in str(error) for word in ("YAML", "tokenizer")):
            raise
        fix = "stipple convert takes --yaml, --tokenizer and --prediction, and makes a folder for init_from"
        raise ValueError(f"{error} ({fix})") from None


def config_from_init(values: dict[str, Any], init: InitModel[ModelParts] | None = None) -> dict[str, Any]:
    """The defaults that a run takes from the model that it starts from, as nested config values.

    Args:
        values: the config as written, with `init_from`.
        init: opens the model; None opens it for this call alone.
    """
    path = values.get("init_from")
    if not isinstance(path, str):
        return {}
    parts = (init or InitModel(open_init)).open(path)
    return {
        "autoencoder": path,
        "data": {"image_size": parts.unet.config.sample_size * parts.autoencoder.downsampling},
        folder_of(parts.unet.config): to_dict(parts.unet.config),
        "diffusion": {
            "prediction": parts.scheduling.prediction,
            "schedule": to_dict(make_schedule(parts.scheduling.schedule).config),
        },
        "samples": {name: getattr(default_settings(parts), name) for name in DEFAULT_SAMPLES} | student_samples(values),
        **({} if values.get("distillation") is None else {"validation": {"every": 0}}),
    }
