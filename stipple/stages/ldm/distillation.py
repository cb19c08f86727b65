"""Distillation of a guided teacher: consistency (Luo et al. 2023) or guidance (Meng et al. 2022)."""

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

CONSISTENCY_ONLY = ("levels", "target_decay", "huber")  # settings without effect on the other kind


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Distillation of the model of `init_from`, the teacher, into a student that starts as its copy.

    Raises:
        ValueError: a value is not supported.
    """

    kind: str = "consistency"  # a key of DISTILLATIONS
    guidance_scale: tuple[float, float] = (5.0, 5.0)  # of the teacher, drawn between these; 1: no guidance
    levels: int = 50  # consistency: evenly spaced training times; the teacher steps from each to the one below
    target_decay: float = 0.95  # consistency: of the average of the student that is its target; 0: the student itself
    huber: float = 0.001  # consistency: errors of an element below about this are squared; 0: all are

    def __post_init__(self):
        if self.kind not in DISTILLATIONS:
            raise ValueError(f"distillation.kind {self.kind!r} is unknown; use one of {', '.join(DISTILLATIONS)}")
        low, high = self.guidance_scale
        if not 1 <= low <= high:
            raise ValueError(
                f"distillation.guidance_scale {low} to {high} must not fall or start below 1; use such as [3, 15]"
            )
        if self.levels < 2:
            raise ValueError(f"distillation.levels {self.levels} must be at least 2; 50 is usual")
        if not 0 <= self.target_decay < 1:
            raise ValueError(f"distillation.target_decay {self.target_decay} must be at least 0 and below 1")
        if self.huber < 0:
            raise ValueError(f"distillation.huber {self.huber} must be at least 0; 0 is the squared error")
        for name in CONSISTENCY_ONLY if self.kind == "guidance" else ():
            if getattr(self, name) != getattr(DistillationConfig, name):
                raise ValueError(
                    f"distillation.{name} {getattr(self, name)} only applies to kind consistency; leave it out"
                )

    @property
    def guides(self) -> bool:
        """Whether the teacher is guided, at some scale at least."""
        return self.guidance_scale[1] > 1

    def scales(self, u: Tensor) -> Tensor:
        """Map uniform numbers [B] to guidance scales [B]."""
        low, high = self.guidance_scale
        return low + (high - low) * u


@dataclass(frozen=True, kw_only=True)
class ConsistencyDistillation:
    """Train the student to predict at each time what its average predicts after one step of the guided teacher."""

    config: DistillationConfig
    teacher: Denoiser
    unet: nn.Module  # the student, not wrapped
    averages: Sequence[Ema]  # one, of the student's weights; empty: the student is its own target

    def __call__(self, denoiser: Denoiser, batch: DiffusionBatch) -> Tensor:
        """Compute the losses [B], see `stipple.stages.ldm.objectives.Objective`."""
        scale = self.config.scales(batch.draw("guidance scale"))
        t, s = rung(denoiser.schedule, batch.t, self.config.levels)
        return consistency_loss(
            ConsistencyFunction(denoiser),
            ConsistencyFunction(replace(denoiser, network=self._averaged) if self.averages else denoiser),
            _guided(self.config, self.teacher, batch, scale),
            denoiser.add_noise(batch.z_0, batch.noise, t),
            t,
            s,
            _with_scale(self.unet, batch.context, scale),
            denoiser.schedule,
            self.config.huber,
        )

    def _averaged(self, *arguments: Any) -> Tensor:
        """Call the student's network with its averaged weights."""
        return functional_call(self.unet, self.averages[0].averages, arguments)


@dataclass(frozen=True, kw_only=True)
class GuidanceDistillation:
    """Train the student to predict in one call what the guided teacher predicts in two."""

    config: DistillationConfig
    teacher: Denoiser
    unet: nn.Module  # the student, not wrapped
    averages: Sequence[Ema] = ()

    def __call__(self, denoiser: Denoiser, batch: DiffusionBatch) -> Tensor:
        """Compute the losses [B], see `stipple.stages.ldm.objectives.Objective`."""
        scale, t = self.config.scales(batch.draw("guidance scale")), batch.t
        teacher = _guided(self.config, self.teacher, batch, scale)
        context = _with_scale(self.unet, batch.context, scale)
        return guidance_loss(denoiser, teacher, denoiser.add_noise(batch.z_0, batch.noise, t), t, context)


def _guided(config: DistillationConfig, teacher: Denoiser, batch: DiffusionBatch, scale: Tensor) -> Teacher:
    """The teacher, guided at scales [B]; without guidance, and so without null contexts, if these are always 1."""
    if not config.guides:
        return partial(teacher, context=batch.context)
    return guided_teacher(teacher, batch.context, batch.null, scale)


def _with_scale(unet: nn.Module, context: Context, scale: Tensor) -> Context:
    """Add the guidance scale to the context if the student's network reads one; else it learns the mean over scales."""
    return context if unet.config.guidance_dim is None else replace(context, guidance=scale.to(unet.conv_in.weight))


def _consistency(config: DistillationConfig, teacher: Denoiser, unet: nn.Module) -> ConsistencyDistillation:
    average = EmaConfig(decay=config.target_decay, warmup=False)
    averages = [Ema(unet, average)] if config.target_decay else []
    return ConsistencyDistillation(config=config, teacher=teacher, unet=unet, averages=averages)


def _guidance(config: DistillationConfig, teacher: Denoiser, unet: nn.Module) -> GuidanceDistillation:
    return GuidanceDistillation(config=config, teacher=teacher, unet=unet)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A kind of distillation, and how its students are sampled by default."""

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
        scheduling={
            "spacing": "trailing"
        },  # better for few steps than the default of samplers: docs/tasks/few_steps.md
    ),
}


def student_samples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Default fields of `samples` for the student of a run, from its config as written; empty without distillation.

    A student that reads the guidance scale gets the middle of the scales that it is trained on.
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
    """Fields of Scheduling in which a student differs from its teacher: times that suit few steps."""
    chosen = dict(DISTILLATIONS[config.kind].scheduling)
    if "spacing" in chosen and config.levels != RUNGS:
        chosen["spacing"] = "trailing"
    return chosen
