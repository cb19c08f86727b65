"""The table of guidances that a picture may be made with, and how they are put around a denoiser.

Guidance by gradients (`guidance_by_gradient`) takes more than settings can say.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.denoising.denoiser import Denoiser
from ldm.guidance.base import (
    Combine,
    Denoise,
    autoguidance,
    classifier_free,
    composed,
    extrapolate,
    in_interval,
    rescaled,
    scale_of,
    thresholded,
)
from ldm.guidance.combines import apg, cfg_plus_plus, zero_output, zero_star
from ldm.guidance.perturbed_attention import perturbed_attention

ZERO_INIT = 0.04  # share of a walk's steps for which CFG-Zero* leaves a flow standing (Fan et al. 2025, section 4.2)
RESTING = (
    "velocity",
    "flow",
    "edm",
)  # predictions whose 0 is a direction of rest; of others it is no noise, or no data


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How pictures are guided.

    Raises:
        ValueError: in one line, for what is wrong with any model.
    """

    method: str = "classifier_free"  # a key of GUIDANCES
    scale: float = 5.0  # 1: no guidance; cfg_plus_plus: the paper's lambda, 0 to 1
    rescale: float = 0.0  # share of the contrast that guidance adds, which is taken back
    start: float = 1.0  # guided at times from here
    stop: float = 0.0  # down to here
    bound: float | None = None  # largest absolute value of estimates; None: they are not thresholded
    percentile: float | None = None  # of dynamic thresholding, in percent; None: static
    norm: float | None = None  # apg: what the length of an image's difference is cut to; None: it is not
    perturbed_scale: float = 3.0  # perturbed_attention: its own scale

    def __post_init__(self) -> None:
        if self.method not in GUIDANCES:
            nearest = difflib.get_close_matches(self.method.lower(), GUIDANCES, n=1, cutoff=0.0)[0]
            names = ", ".join(GUIDANCES)
            raise ValueError(f"guidance method {self.method!r} is unknown; did you mean {nearest}? There are {names}")
        if self.method == "cfg_plus_plus" and not 0 <= self.scale <= 1:
            raise ValueError(f"guidance scale {self.scale} of cfg_plus_plus must be between 0 and 1; 0.6 is usual")
        if self.percentile is not None and self.bound is None:
            raise ValueError(f"guidance percentile {self.percentile} needs a guidance bound; 4 is usual for latents")
        if self.norm is not None and self.method != "apg":
            raise ValueError(f"guidance norm {self.norm} is for method apg, not {self.method}; leave it out")
        if self.method == "cfg_plus_plus" and (self.rescale or self.bound is not None):
            raise ValueError("cfg_plus_plus guides beyond its estimate: leave out guidance rescale and guidance bound")
        scale_of(self.scale)  # from here on, each part checks its own numbers
        rescaled(self.rescale, None)
        apg(norm=self.norm)
        if self.method == "perturbed_attention":
            perturbed_attention(None, None, None, self.scale, self.perturbed_scale)
        _around(self, None, None)

    @property
    def reads_null(self) -> bool:
        """Whether the empty caption, or the negative prompt, is computed at all."""
        return self.method == "cfg_plus_plus" or self.method != "autoguidance" and self.scale != 1


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """What guidance is made of, for one run of a sampler."""

    denoiser: Denoiser
    context: Any  # None: the model is told nothing, and there is nothing to be guided by classifier-free
    null: Any = None  # the empty caption, or negative prompts; only where `GuidanceConfig.reads_null`
    times: Tensor  # of the walk, falling [S + 1]
    weak: Denoiser | None = None  # autoguidance: the weaker model
    others: Sequence[tuple[Any, float]] = ()  # classifier_free: further contexts and their weights, see `composed`
    gradient_guides: Sequence[
        Callable[[Denoise], Denoise]
    ] = ()  # what is put around the guided denoiser, such as a gradient
    reads_scale: bool = False  # the network was distilled from a guided one, and reads the scale in its contexts


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A guidance and what there is to know of it."""

    build: Callable[[GuidanceConfig, Ingredients], Denoise]
    calls: str  # of the network at each time, and the size of their batches for B pictures
    scale: str  # what is usual
    does: str
    default: float | None = None  # the scale where none is named; None: the model's own

    @property
    def summary(self) -> str:
        """One line: its network calls at each time, its usual scale, what it does."""
        return f"{self.calls:24} scale {self.scale:10} {self.does}"


def guided(config: GuidanceConfig, given: Ingredients) -> Denoise:
    """The denoiser that a config describes, denoise(z_t, t) -> z_0, for one run of a sampler.

    Raises:
        ValueError: autoguidance without a weaker model.
    """
    if given.reads_scale:
        given, config = _with_scale(given, config.scale), replace(config, scale=1.0)
    plain = classifier_free(given.denoiser, given.context, None, 1.0)
    inside = GUIDANCES[config.method].build(config, given)
    for guide in given.gradient_guides:
        inside = guide(inside)
    return _around(config, inside, plain)


def _around(config: GuidanceConfig, inside: Denoise, outside: Denoise) -> Denoise:
    """What may be put around every guidance."""
    whole = (config.start, config.stop) == (1, 0)
    denoise = inside if whole else in_interval(inside, outside, config.start, config.stop)
    return denoise if config.bound is None else thresholded(denoise, config.bound, config.percentile)


def _with_scale(given: Ingredients, scale: float) -> Ingredients:
    """With contexts that say the guidance scale."""

    def told(context: Any) -> Any:
        return context and replace(context, guidance=torch.full((context.batch_size,), scale))

    others = [(told(context), weight) for context, weight in given.others]
    return replace(given, context=told(given.context), null=told(given.null), others=others)


def _combine(config: GuidanceConfig, given: Ingredients, combine: Combine = extrapolate) -> Combine:
    return rescaled(config.rescale, given.denoiser.coefficients, combine) if config.rescale else combine


def _free(config: GuidanceConfig, given: Ingredients, combine: Combine = extrapolate) -> Denoise:
    scale = 1.0 if given.context is None else config.scale
    if given.others:
        contexts, weights = zip((given.context, 1.0), *given.others, strict=True)
        return composed(given.denoiser, contexts, [scale * weight for weight in weights], given.null)
    return classifier_free(given.denoiser, given.context, given.null, scale, _combine(config, given, combine))


def _apg(config: GuidanceConfig, given: Ingredients) -> Denoise:
    return _free(config, given, apg(norm=config.norm))


def _cfg_plus_plus(config: GuidanceConfig, given: Ingredients) -> Denoise:
    scale = 1.0 if given.context is None else cfg_plus_plus(config.scale, given.times, given.denoiser.schedule)
    return classifier_free(given.denoiser, given.context, given.null, scale, _combine(config, given))


def _cfg_zero_star(config: GuidanceConfig, given: Ingredients) -> Denoise:
    coefficients = given.denoiser.coefficients
    inside = _free(config, given, zero_star(coefficients))
    still = round(ZERO_INIT * (len(given.times) - 1))
    if config.scale == 1 or given.context is None or not still or given.denoiser.prediction not in RESTING:
        return inside
    return in_interval(inside, zero_output(coefficients), start=given.times[still].item(), stop=0.0)


def _perturbed_attention(config: GuidanceConfig, given: Ingredients) -> Denoise:
    scale, combine = 1.0 if given.context is None else config.scale, _combine(config, given)
    return perturbed_attention(
        given.denoiser, given.context, given.null, scale, config.perturbed_scale, combine=combine
    )


def _autoguidance(config: GuidanceConfig, given: Ingredients) -> Denoise:
    if given.weak is None:
        raise ValueError("guidance method autoguidance needs a weaker model; give one, or use another method")
    strong, weak = (classifier_free(denoiser, given.context, None, 1.0) for denoiser in (given.denoiser, given.weak))
    return autoguidance(strong, weak, config.scale, _combine(config, given))


GUIDANCES: dict[str, Guidance] = {
    "classifier_free": Guidance(
        build=_free,
        calls="1 of 2 B",
        scale="2 to 10",
        does="Away from the empty caption or the negative prompt (Ho & Salimans 2022)",
    ),
    "apg": Guidance(
        build=_apg,
        calls="1 of 2 B",
        scale="5 to 20",
        does="The same without the part that only adds contrast, with momentum (Sadat et al. 2024)",
    ),
    "cfg_plus_plus": Guidance(
        build=_cfg_plus_plus,
        calls="1 of 2 B",
        scale="0.2 to 1",
        default=0.6,
        does="Steps with the unconditional noise: CFG++, made for ddim (Chung et al. 2024)",
    ),
    "cfg_zero_star": Guidance(
        build=_cfg_zero_star,
        calls="1 of 2 B",
        scale="2 to 10",
        does="The unconditional output fitted to the conditional; flows rest at first (Fan et al. 2025)",
    ),
    "perturbed_attention": Guidance(
        build=_perturbed_attention,
        calls="1 of 3 B, 2 B at scale 1",
        scale="1 to 7",
        does="Away from blind self-attention as well, at perturbed_scale (Ahn et al. 2024)",
    ),
    "autoguidance": Guidance(
        build=_autoguidance,
        calls="1 of B, 1 of B weaker",
        scale="1.5 to 3",
        default=2.0,
        does="Away from a weaker model (Karras et al. 2024)",
    ),
}
