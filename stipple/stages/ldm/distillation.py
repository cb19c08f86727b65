"""What a few-step student learns of a guided teacher: consistency (Luo et al. 2023), or guidance (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from conditioning.interface.context import Context
from ldm.denoising.denoiser import Denoiser
from ldm.losses.consistency import ConsistencyFunction, Teacher, consistency_loss, guidance_loss, guided_teacher, rung
from ldm.samplers.spacing import RUNGS
from stipple.stages.ldm.diffusion_batch import DiffusionBatch
from stipple.training.optimization.ema import Ema, EmaConfig

CONSISTENCY_ONLY = ("levels", "target_decay", "huber")  # settings


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How the model of init_from, the teacher, is taught to a student that begins as its copy.

    Raises:
        ValueError: in one line naming value, rule and mend.
    """

    kind: str = "consistency"  # a key of DISTILLATIONS
    guidance_scale: tuple[float, float] = (5.0, 5.0)  # of the teacher, drawn between these; 1: it is not guided
    levels: int = 50  # consistency: times that are learned, evenly spaced; the teacher steps from each to the one below
    target_decay: float = 0.95  # consistency: of the average that the student is compared with; 0: the student itself
    huber: float = 0.001  # consistency: up to about this, errors of an element count by their square; 0: all do

    def __post_init__(self):
        if self.kind not in DISTILLATIONS:
            raise ValueError(f"distillation.kind {self.kind!r} is unknown; use one of {', '.join(DISTILLATIONS)}")
        low, high = self.guidance_scale
        if not 1 <= low <= high:
            raise ValueError(
                f"distillation.guidance_scale {low} to {high} must not fall, nor begin below 1; use such as [3, 15]"
            )
        if self.levels < 2:
            raise ValueError(f"distillation.levels {self.levels} must be at least 2; 50 is usual")
        if not 0 <= self.target_decay < 1:
            raise ValueError(f"distillation.target_decay {self.target_decay} must be at least 0 and below 1")
        if self.huber < 0:
            raise ValueError(f"distillation.huber {self.huber} must be at least 0, which is the squared error")
        for name in CONSISTENCY_ONLY if self.kind == "guidance" else ():
            if getattr(self, name) != getattr(DistillationConfig, name):
                raise ValueError(f"distillation.{name} {getattr(self, name)} is of kind consistency; leave it out")

    @property
    def guides(self) -> bool:
        """Whether the teacher is guided, at any scale."""
        return self.guidance_scale[1] > 1

    def scales(self, u: Tensor) -> Tensor:
        """Guidance scales [B] of uniform numbers [B]."""
        low, high = self.guidance_scale
        return low + (high - low) * u


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """The student is to say at each time what its own average says one step of the guided teacher later."""

    config: DistillationConfig
    teacher: Denoiser
    unet: nn.Module  # the student, not wrapped
    averages: Sequence[Ema]  # one, of the student's weights; none: it is compared with itself

    def __call__(self, denoiser: Denoiser, examples: DiffusionBatch) -> Tensor:
        """Losses [B], see `stipple.stages.ldm.objectives.Objective`."""
        scale = self.config.scales(examples.draw("guidance scale"))
        t, s = rung(denoiser.schedule, examples.t, self.config.levels)
        return consistency_loss(
            ConsistencyFunction(denoiser),
            ConsistencyFunction(replace(denoiser, network=self._averaged) if self.averages else denoiser),
            _guided(self.config, self.teacher, examples, scale),
            denoiser.add_noise(examples.z_0, examples.noise, t),
            t,
            s,
            _with_scale(self.unet, examples.context, scale),
            denoiser.schedule,
            self.config.huber,
        )

    def _averaged(self, *told: Any) -> Tensor:
        """The student's network with its averaged weights."""
        return functional_call(self.unet, self.averages[0].averages, told)


@dataclass(frozen=True, kw_only=True)
class GuidanceDistillation:
    """The student is to say in one call what the guided teacher says in two."""

    config: DistillationConfig
    teacher: Denoiser
    unet: nn.Module  # the student, not wrapped
    averages: Sequence[Ema] = ()

    def __call__(self, denoiser: Denoiser, examples: DiffusionBatch) -> Tensor:
        """Losses [B], see `stipple.stages.ldm.objectives.Objective`."""
        scale, t = self.config.scales(examples.draw("guidance scale")), examples.t
        teacher = _guided(self.config, self.teacher, examples, scale)
        told = _with_scale(self.unet, examples.context, scale)
        return guidance_loss(denoiser, teacher, denoiser.add_noise(examples.z_0, examples.noise, t), t, told)


def _guided(config: DistillationConfig, teacher: Denoiser, examples: DiffusionBatch, scale: Tensor) -> Teacher:
    """The teacher at guidance scales [B]; alone where these are always 1, and nobody is told nothing."""
    if not config.guides:
        return partial(teacher, context=examples.context)
    return guided_teacher(teacher, examples.context, examples.null, scale)


def _with_scale(unet: nn.Module, context: Context, scale: Tensor) -> Context:
    """What the student is told: of the scale only where its network reads one; else it learns the mean over scales."""
    return context if unet.config.guidance_dim is None else replace(context, guidance=scale.to(unet.conv_in.weight))


def _consistency(config: DistillationConfig, teacher: Denoiser, unet: nn.Module) -> ConsistencyDistillation:
    average = EmaConfig(decay=config.target_decay, warmup=False)
    averages = [Ema(unet, average)] if config.target_decay else []
    return ConsistencyDistillation(config=config, teacher=teacher, unet=unet, averages=averages)


def _guidance(config: DistillationConfig, teacher: Denoiser, unet: nn.Module) -> GuidanceDistillation:
    return GuidanceDistillation(config=config, teacher=teacher, unet=unet)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A way to distill, and how its students make pictures where nobody says otherwise."""

    build: Callable[[DistillationConfig, Denoiser, nn.Module], ConsistencyDistillation | GuidanceDistillation]
    samples: Mapping[str, Any]  # fields of SamplesConfig, over the teacher's
    scheduling: Mapping[str, Any]  # fields of Scheduling, over the teacher's


DISTILLATIONS = {
    "consistency": Distillation(
        build=_consistency,
        samples={"sampler": "lcm", "steps": 4, "guidance_scale": 1.0},
        scheduling={"sampler": "lcm", "spacing": "rungs"},
    ),
    "guidance": Distillation(
        build=_guidance,
        samples={"guidance_scale": 1.0},
        scheduling={"spacing": "trailing"},  # for few steps better than what samplers choose for many: few_steps.md
    ),
}


def student_samples(values: Mapping[str, Any]) -> dict[str, Any]:
    """How students make pictures, of a run's config as it is written; nothing where none is distilled.

    One that reads the guidance scale is told the middle of those that it has learned.
    """
    section = values.get("distillation")
    kind = section.get("kind", DistillationConfig.kind) if isinstance(section, Mapping) else None
    if kind not in DISTILLATIONS:
        return {}
    samples, unet = dict(DISTILLATIONS[kind].samples), values.get("unet")
    scales = section.get("guidance_scale", DistillationConfig().guidance_scale)
    if isinstance(unet, Mapping) and unet.get("guidance_dim") and isinstance(scales, list | tuple) and len(scales) == 2:
        samples["guidance_scale"] = sum(scales) / 2
    return samples


def scheduling_of(config: DistillationConfig) -> dict[str, Any]:
    """How students are sampled, over the teacher's: on times that suit few steps."""
    chosen = dict(DISTILLATIONS[config.kind].scheduling)
    if "spacing" in chosen and config.levels != RUNGS:
        chosen["spacing"] = "trailing"
    return chosen
