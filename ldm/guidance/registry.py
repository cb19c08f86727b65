"""The table of guidance methods, and how they are applied to a denoiser.

Guidance by gradients (`ldm.guidance.gradient`) needs further networks, which `ldm.sampling.gradient_guides` provides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.denoising.denoiser import Denoiser
from ldm.guidance.classifier_free import (
    Combine,
    Denoise,
    autoguidance,
    check_interval,
    check_rescale,
    check_scale,
    classifier_free,
    composed,
    extrapolate,
    in_interval,
    rescaled,
)
from ldm.guidance.combines import apg, cfg_plus_plus, check_apg, zero_output, zero_star
from ldm.guidance.perturbed_attention import check_perturbed, perturbed_attention
from ldm.guidance.thresholding import check_threshold, thresholded
from stipple_core.nearest import did_you_mean

ZERO_INIT = 0.04  # share of the steps for which CFG-Zero* does not move (Fan et al. 2025, section 4.2)
RESTING = ("velocity", "flow", "edm")  # predictions of which 0 means not to move


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How images are guided.

    Raises:
        ValueError: a value is invalid with every model.
    """

    method: str = "classifier_free"  # a key of GUIDANCES
    scale: float = 5.0  # 1: no guidance; cfg_plus_plus: the paper's lambda, 0 to 1
    rescale: float = 0.0  # share of the added contrast that is removed
    start: float = 1.0  # guide at times up to this one
    stop: float = 0.0  # guide at times down to this one
    bound: float | None = None  # largest absolute value of estimates; None: no limit
    percentile: float | None = None  # of dynamic thresholding, in percent; None: static
    norm: float | None = None  # apg: largest norm of an image's difference; None: no limit
    perturbed_scale: float = 3.0  # perturbed_attention: its own scale

    def __post_init__(self) -> None:
        if self.method not in GUIDANCES:
            nearest, names = did_you_mean(self.method.lower(), GUIDANCES), ", ".join(GUIDANCES)
            raise ValueError(f"guidance method {self.method!r} is unknown; did you mean {nearest}? There are {names}")
        if self.percentile is not None and self.bound is None:
            raise ValueError(f"guidance percentile {self.percentile} needs a guidance bound; 4 is usual for latents")
        if self.norm is not None and self.method != "apg":
            raise ValueError(f"guidance norm {self.norm} is for method apg, not {self.method}; leave it out")
        GUIDANCES[self.method].check(self)
        check_scale(self.scale)
        check_rescale(self.rescale)
        check_interval(self.start, self.stop)
        if self.bound is not None:
            check_threshold(self.bound, self.percentile)

    @property
    def reads_null(self) -> bool:
        """Whether the empty caption or the negative prompt is computed."""
        return self.method == "cfg_plus_plus" or self.method != "autoguidance" and self.scale != 1


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What guidance is built from, for one run of a sampler."""

    denoiser: Denoiser
    context: Any  # None: an unconditional model, without classifier-free guidance
    null: Any = None  # of the empty caption or negative prompts; only if `GuidanceConfig.reads_null`
    times: Tensor  # of the steps, falling [S + 1]
    weak: Denoiser | None = None  # autoguidance: the weaker model
    others: Sequence[tuple[Any, float]] = ()  # classifier_free: further contexts and their weights, see `composed`
    gradient_guides: Sequence[Callable[[Denoise], Denoise]] = ()  # wrappers of the guided denoiser
    reads_scale: bool = False  # the network was distilled from a guided one: contexts hold the guidance scale


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A guidance method and its properties."""

    build: Callable[[GuidanceConfig, Ingredients], Denoise]
    check: Callable[[GuidanceConfig], None] = lambda config: None  # raises ValueError for a config it does not support
    calls: str  # of the network at each time, and their batch sizes for B images
    scale: str  # usual guidance scales
    does: str  # one line of description
    default: float | None = None  # guidance scale by default; None: the model's

    @property
    def summary(self) -> str:
        """One line: its network calls at each time, its usual scale, what it does."""
        return f"{self.calls:24} scale {self.scale:10} {self.does}"


def guided(config: GuidanceConfig, parts: Ingredients) -> Denoise:
    """The denoiser that a config describes, denoise(z_t, t) -> z_0, for one run of a sampler.

    Raises:
        ValueError: autoguidance without a weaker model.
    """
    if parts.reads_scale:
        parts, config = _with_scale(parts, config.scale), replace(config, scale=1.0)
    plain = classifier_free(parts.denoiser, parts.context, None, 1.0)
    inside = GUIDANCES[config.method].build(config, parts)
    for guide in parts.gradient_guides:
        inside = guide(inside)
    return _around(config, inside, plain)


def _around(config: GuidanceConfig, inside: Denoise, outside: Denoise) -> Denoise:
    """Apply what every method supports: an interval of times and a bound of estimates."""
    whole = (config.start, config.stop) == (1, 0)
    denoise = inside if whole else in_interval(inside, outside, config.start, config.stop)
    return denoise if config.bound is None else thresholded(denoise, config.bound, config.percentile)


def _with_scale(parts: Ingredients, scale: float) -> Ingredients:
    """Put the guidance scale into the contexts."""

    def with_guidance(context: Any) -> Any:
        return context and replace(context, guidance=torch.full((context.batch_size,), scale))

    others = [(with_guidance(context), weight) for context, weight in parts.others]
    return replace(parts, context=with_guidance(parts.context), null=with_guidance(parts.null), others=others)


def _combine(config: GuidanceConfig, parts: Ingredients, combine: Combine = extrapolate) -> Combine:
    return rescaled(config.rescale, parts.denoiser.coefficients, combine) if config.rescale else combine


def _free(config: GuidanceConfig, parts: Ingredients, combine: Combine = extrapolate) -> Denoise:
    scale = 1.0 if parts.context is None else config.scale
    if parts.others:
        contexts, weights = zip((parts.context, 1.0), *parts.others, strict=True)
        return composed(parts.denoiser, contexts, [scale * weight for weight in weights], parts.null)
    return classifier_free(parts.denoiser, parts.context, parts.null, scale, _combine(config, parts, combine))


def _apg(config: GuidanceConfig, parts: Ingredients) -> Denoise:
    return _free(config, parts, apg(norm=config.norm))


def _cfg_plus_plus(config: GuidanceConfig, parts: Ingredients) -> Denoise:
    scale = 1.0 if parts.context is None else cfg_plus_plus(config.scale, parts.times, parts.denoiser.schedule)
    return classifier_free(parts.denoiser, parts.context, parts.null, scale, _combine(config, parts))


def _cfg_zero_star(config: GuidanceConfig, parts: Ingredients) -> Denoise:
    coefficients = parts.denoiser.coefficients
    inside = _free(config, parts, zero_star(coefficients))
    still = round(ZERO_INIT * (len(parts.times) - 1))
    if config.scale == 1 or parts.context is None or not still or parts.denoiser.prediction not in RESTING:
        return inside
    return in_interval(inside, zero_output(coefficients), start=parts.times[still].item(), stop=0.0)


def _perturbed_attention(config: GuidanceConfig, parts: Ingredients) -> Denoise:
    scale, combine = 1.0 if parts.context is None else config.scale, _combine(config, parts)
    return perturbed_attention(
        parts.denoiser, parts.context, parts.null, scale, config.perturbed_scale, combine=combine
    )


def _autoguidance(config: GuidanceConfig, parts: Ingredients) -> Denoise:
    if parts.weak is None:
        raise ValueError("guidance method autoguidance requires a weaker model; specify one, or use another method")
    strong, weak = (classifier_free(denoiser, parts.context, None, 1.0) for denoiser in (parts.denoiser, parts.weak))
    return autoguidance(strong, weak, config.scale, _combine(config, parts))


def _check_cfg_plus_plus(config: GuidanceConfig) -> None:
    if not 0 <= config.scale <= 1:
        raise ValueError(f"guidance scale {config.scale} of cfg_plus_plus must be between 0 and 1; 0.6 is usual")
    if config.rescale or config.bound is not None:
        raise ValueError("cfg_plus_plus does not support guidance rescale and guidance bound; leave them out")


def _check_perturbed_attention(config: GuidanceConfig) -> None:
    check_perturbed(config.scale, config.perturbed_scale)


GUIDANCES: dict[str, Guidance] = {
    "classifier_free": Guidance(
        build=_free,
        calls="1 of 2 B",
        scale="2 to 10",
        does="Away from the empty caption or the negative prompt (Ho & Salimans 2022)",
    ),
    "apg": Guidance(
        build=_apg,
        check=lambda config: check_apg(norm=config.norm),
        calls="1 of 2 B",
        scale="5 to 20",
        does="Classifier-free without the part that adds contrast, with momentum (Sadat et al. 2024)",
    ),
    "cfg_plus_plus": Guidance(
        build=_cfg_plus_plus,
        check=_check_cfg_plus_plus,
        calls="1 of 2 B",
        scale="0.2 to 1",
        default=0.6,
        does="Steps with the unconditional noise: CFG++, made for ddim (Chung et al. 2024)",
    ),
    "cfg_zero_star": Guidance(
        build=_cfg_zero_star,
        calls="1 of 2 B",
        scale="2 to 10",
        does="The unconditional output fitted to the conditional; no motion at first (Fan et al. 2025)",
    ),
    "perturbed_attention": Guidance(
        build=_perturbed_attention,
        check=_check_perturbed_attention,
        calls="1 of 3 B, 2 B at scale 1",
        scale="1 to 7",
        does="Also away from perturbed self-attention, at perturbed_scale (Ahn et al. 2024)",
    ),
    "autoguidance": Guidance(
        build=_autoguidance,
        calls="1 of B, 1 of B weaker",
        scale="1.5 to 3",
        default=2.0,
        does="Away from a weaker model (Karras et al. 2024)",
    ),
}
