"""What a stage-2 run is told: its config, which stipple cache reads too, and what init_from gives it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from conditioning.conditioners import ConditionerConfig
from ldm.formats.diffusers.network_kinds import NetworkConfig, folder_of
from ldm.formats.model_parts import ModelParts
from ldm.formats.opening import open_model
from ldm.losses.diffusion_loss import check_weighting
from ldm.losses.time_density import DensityConfig
from ldm.networks.prior_config import PriorConfig
from ldm.networks.unet_config import UNetConfig
from ldm.sampling.defaults import default_settings
from ldm.schedules.base import ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple.stages.data.run_settings import check_run
from stipple.stages.ldm.denoiser_validation import LdmValidationConfig, SamplesConfig
from stipple.stages.ldm.distillation import DistillationConfig, student_samples
from stipple.stages.ldm.preservation import PreservationConfig
from stipple.stages.ldm.trainable import InversionConfig, LoraConfig
from stipple.training.optimization.ema import EmaConfig
from stipple.training.optimization.optimizer import OptimizerConfig
from stipple.training.trainer_config import TrainerConfig
from stipple_core.config import to_dict
from stipple_core.data.records.data_config import DataConfig

DEFAULT_SAMPLES = (  # fields of SamplesConfig that a model has defaults for
    *("sampler", "steps", "corrections", "guidance_scale", "guidance_bound", "guidance_percentile"),
)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What is learned."""

    prediction: str = "noise"  # what the network outputs: noise, clean, velocity, flow, score or edm
    weighting: str = "simple"  # of the squared error over noise levels: simple, min_snr, vlb, p2, edm, sigmoid or noise
    gamma: float | None = None  # of min_snr, p2 and sigmoid; null: the paper's
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    density: DensityConfig = field(default_factory=DensityConfig)  # how often each time is drawn

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"diffusion.caption_dropout {self.caption_dropout} is a share; use 0 to 1, often 0.1")
        check_weighting(self.weighting, self.gamma)


@dataclass(frozen=True, kw_only=True)
class LdmRunConfig:
    """A stage-2 run; stipple cache reads the same file."""

    run: str = "runs/ldm"  # folder of everything this run writes
    seed: int = 0  # of every draw
    init_from: str | None = None  # model folder or single file to go on from; what is not said here is as it is there
    data: DataConfig
    preservation: PreservationConfig | None = None  # pictures of the class of what data shows, learned beside them
    lora: LoraConfig | None = None  # learn low-rank additions to init_from instead of its weights
    inversion: InversionConfig | None = None  # learn a new word for init_from and nothing else
    autoencoder: str  # model folder of stage 1, any diffusers model folder, or a single file; default: init_from
    cache: str | None = None  # folder that stipple cache fills; null: encode images while training
    cache_contexts: bool = True  # of captions too; false where they would take too much disk (docs/scaling.md)
    cache_precision: Literal["fp32", "fp16"] = "fp32"  # of the cached moments
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)  # default: that of init_from
    unet: UNetConfig = field(default_factory=UNetConfig)
    prior: PriorConfig | None = None  # the network of a model of image embeddings, in place of unet
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    distillation: DistillationConfig | None = None  # learn what the model of init_from does, in fewer steps
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

    @property
    def drops(self) -> bool:
        """Whether it needs what says nothing: for captions that are dropped, or a teacher's guidance."""
        return self.diffusion.caption_dropout > 0 or (self.distillation is not None and self.distillation.guides)

    @property
    def network(self) -> NetworkConfig:
        """The shape of the network that is trained."""
        return self.prior or self.unet


def check_distillation(config: LdmRunConfig) -> None:
    """Raise ValueError where a network and what it is to learn do not go together."""
    distillation = config.distillation
    if distillation is None and config.unet.guidance_dim is not None:
        dim = config.unet.guidance_dim
        raise ValueError(f"unet.guidance_dim {dim} is of distilled networks; give distillation, or use null")
    if distillation is None:
        return
    if config.init_from is None:
        raise ValueError(f"distillation.kind {distillation.kind} teaches what a trained model does; give init_from")
    if config.conditioner != ConditionerConfig():
        raise ValueError(f"distillation.kind {distillation.kind} keeps the conditioner of init_from; leave yours out")
    for name in ("weighting", "gamma"):
        if (value := getattr(config.diffusion, name)) != getattr(DiffusionConfig, name):
            raise ValueError(f"diffusion.{name} {value} is of denoising, and distillation is given; leave one out")
    if config.validation.every:
        every = config.validation.every
        raise ValueError(f"validation.every {every} measures denoising, which distillation does not lower; use 0")


def open_source(path: str) -> ModelParts:
    """The model that init_from names. Raises as `open_model`, saying who takes what a single file may need besides."""
    try:
        return open_model(path)
    except (ValueError, FileNotFoundError) as error:
        if not any(word in str(error) for word in ("YAML", "tokenizer")):
            raise
        mend = "stipple convert takes --yaml, --tokenizer and --prediction, and makes a folder for init_from"
        raise ValueError(f"{error} ({mend})") from None


def config_from_init(values: dict[str, Any]) -> dict[str, Any]:
    """What a run takes from the model that it goes on from, as the lowest layer of its config."""
    path = values.get("init_from")
    if not isinstance(path, str):
        return {}
    parts = open_source(path)
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


def opened(config: LdmRunConfig) -> ModelParts | None:
    """The model that a run goes on from, if there is one."""
    return None if config.init_from is None else open_source(config.init_from)
