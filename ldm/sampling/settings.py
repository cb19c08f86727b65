"""The settings of an image: all that determines it besides the model, its precision and the machine.

A new setting is one field of `Settings`. Its declaration holds the type, the default, the valid values, and whether a
model stores a default of its own. A setting with the name of a sampler's keyword argument is passed to that sampler.
The drawing commands set it by a flag, which has its own help text.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from PIL import Image

from ldm.denoising.windows import check_windows
from ldm.guidance.registry import GuidanceConfig
from ldm.samplers.onestep import VARIANCES
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS
from stipple_core.nearest import did_you_mean

MAX_FEATHER = 512
MAX_BACK_PROJECTION = 100
MAX_BATCH = 256  # limits the memory that settings read from an image file can ask for
SEEDS = 2**64  # torch's generators take seeds below this number
Source = str | Image.Image  # the path of a file, or in Python a PIL image, which no record can hold
VALUE_TYPES = {
    "str": (str, "text"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "Source": ((str, os.PathLike, Image.Image), "the path of a file"),
}


def setting(
    default: Any,
    valid: Callable[[Any], bool] | None = None,
    rule: str = "",
    *,
    names: Iterable[str] | None = None,
    requires: str | None = None,
    stored: bool = False,
) -> Any:
    """Declare a field of `Settings`.

    Args:
        default: its default value.
        valid: whether a value other than None is allowed.
        rule: the end of the message for a value that is not, such as "must be at least 1".
        names: the allowed names, of a setting that is one of several names.
        requires: another setting that must be set if this one differs from its default.
        stored: whether a model stores its own default of this setting.
    """
    metadata = {"valid": valid, "rule": rule, "names": names, "requires": requires, "stored": stored}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that determines one image besides the model, its precision and the machine.

    Raises:
        ValueError: a value is invalid with every model. The message names the value, the rule and the fix.
    """

    prompt: str = ""  # what the image shows; "": not conditioned on a prompt
    negative_prompt: str = ""  # what guidance moves away from
    also: str = ""  # further prompts: one line each, of a weight and a prompt; a weight below 0 moves away from it
    guidance_scale: float = setting(5.0, stored=True)  # 1: no guidance; above: closer to the prompt, less variety
    guidance_method: str = "classifier_free"  # a key of GUIDANCES
    guidance_rescale: float = setting(0.0, stored=True)  # share of the added contrast that is removed, 0 to 1
    guidance_start: float = 1.0  # guide at times up to this one (1: noise)
    guidance_stop: float = 0.0  # guide at times down to this one (0: the image)
    guidance_bound: float | None = setting(None, stored=True)  # clip estimated latents to this absolute value
    guidance_percentile: float | None = setting(None, stored=True)  # of each estimate, scaled to the bound; None: clip
    guidance_norm: float | None = None  # of apg: largest norm of the difference between both estimates; None: no limit
    perturbed_scale: float = 3.0  # of perturbed_attention
    classifier_scale: float = setting(  # of the gradient of a classifier of noisy latents; 0: no classifier
        0.0, math.isfinite, "must be a finite number; 0 is none, 1 to 10 usual"
    )
    classifier_class: str = ""  # class that the classifier guides to; "": the one that the prompt names
    clip_scale: float = setting(  # of the gradient of a CLIP; 0: no CLIP guidance
        0.0, math.isfinite, "must be a finite number; 0 is none, 1 to 10 usual"
    )
    clip_prompt: str = ""  # text that CLIP guides to; "": the prompt
    steps: int = setting(50, lambda n: n >= 1, "must be at least 1; 20 to 50 are usual", stored=True)  # of the sampler
    sampler: str = setting("ddim", names=SAMPLERS, stored=True)  # a key of SAMPLERS
    eta: float = setting(  # of ddim: share of the noise that is drawn anew at each step
        0.0, lambda eta: 0 <= eta <= 1, "must be between 0 (nothing is drawn anew) and 1", stored=True
    )
    churn: float = setting(  # of heun: noise added and removed again, over all steps (Karras et al. 2022: 0 to 100)
        0.0, lambda churn: 0 <= churn < math.inf, "must be 0 (nothing is added) or a positive number; 40 is usual"
    )
    variance: str = setting("small", names=VARIANCES)  # of ddpm: small, large, or learned by the model
    corrections: int | None = setting(  # of langevin, predictor_corrector: Langevin steps at each noise level
        None, lambda n: n >= 0, "must be at least 0; 1 to 5 are usual", stored=True
    )
    tolerance: float = setting(  # of ode: largest error of a step, relative and absolute
        1e-3, lambda error: 0 < error < 1, "must be between 0 and 1; 0.001 is usual"
    )
    spacing: str | None = setting(None, names=SPACINGS)  # of the sampler's times; None: the sampler's default
    shift: float | None = setting(  # of rectified flow's times: above 1 more of them at high noise; None: as trained
        None, lambda shift: 0 < shift < math.inf, "must be a positive number; 1 is none, 3 usual for large pictures"
    )
    image: Source | None = None  # the image that is changed, completed, enlarged or imitated
    mask: Source | None = setting(None, requires="image")  # of the image: white is painted
    map: Source | None = None  # class numbers or depths of each pixel, for models that are conditioned on a map
    strength: float | None = setting(  # share of the steps that are taken from the noised image on; 1: from noise
        None, lambda s: 0 < s <= 1, "must be above 0 (the image stays) and at most 1 (from noise)", requires="image"
    )
    resample: int = setting(  # with a mask: repetitions of each part of the steps, to fit the new to the old
        1, lambda n: n >= 1, "must be at least 1, which takes each step once; 5 to 10 are usual", requires="mask"
    )
    feather: int = setting(  # with a mask: pixels around it in which the new fades into the old
        0,
        lambda n: 0 <= n <= MAX_FEATHER,
        f"must be between 0 pixels, a hard seam, and {MAX_FEATHER}; 4 to 16 are usual",
        requires="mask",
    )
    noise_level: float = setting(  # noise added to the image, for models that were trained so; 0 to 1
        0.0, lambda level: 0 <= level <= 1, "must be between 0 (none) and 1", requires="image"
    )
    back_projection: int | None = setting(  # rounds that make an enlarged image shrink to its source; None: the model's
        None,
        lambda n: 0 <= n <= MAX_BACK_PROJECTION,
        f"must be between 0 (none) and {MAX_BACK_PROJECTION}; 3 rounds are usual",
        requires="image",
    )
    reuse: int = setting(  # compute the inner layers of the UNet once in so many network calls; above 1 is not exact
        1, lambda n: n >= 1, "must be at least 1, which is exact; 2 and 3 are usual"
    )
    height: int | None = None  # pixels; None: as trained
    width: int | None = None  # pixels; None: as trained
    window: int | None = None  # side of the windows that the UNet processes one by one, in latents; None: no windows
    overlap: int | None = setting(None, requires="window")  # latents shared by neighboring windows; None: half a window
    seed: int = setting(  # of the image's own generator
        42, lambda seed: 0 <= seed < SEEDS, "must be between 0 and 2^64 - 1; -1 alone draws one at random"
    )
    batch: int = setting(  # images computed together, on which the last bits of each may depend
        1, lambda n: n <= MAX_BATCH, f"is more than {MAX_BATCH} pictures computed together; use less"
    )
    place: int = 0  # of the image among them

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check_type(each.name, each.type)
        for each in fields(self):
            self._check_value(each)
        self.guidance()
        self.prompts()
        self._check_combinations()
        for each in fields(self):
            self._check_requirements(each)

    def guidance(self) -> GuidanceConfig:
        """How the image is guided. Raises ValueError."""
        values = {each.name: getattr(self, f"guidance_{each.name}", None) for each in fields(GuidanceConfig)}
        return GuidanceConfig(**values | {"perturbed_scale": self.perturbed_scale})

    def prompts(self) -> list[tuple[str, float]]:
        """The prompt with weight 1, then those of `also` with their weights.

        Raises:
            ValueError: a line of `also` is not a weight and a prompt, or the guidance method takes one prompt only.
        """
        weighted = [(self.prompt, 1.0)]
        for line in filter(str.strip, self.also.split("\n")):
            weight, _, prompt = line.strip().partition(" ")
            try:
                weighted.append((prompt.strip(), float(weight)))
            except ValueError:
                raise ValueError(f'also {line!r} must be a weight and a prompt, as in "0.5 a blue fish"') from None
            if not prompt.strip() or not math.isfinite(weighted[-1][1]):
                raise ValueError(f'also {line!r} must be a finite weight and a prompt, as in "0.5 a blue fish"')
        if len(weighted) > 1 and (self.guidance_method != "classifier_free" or self.guidance_rescale):
            rule = "goes with guidance method classifier_free and no guidance rescale"
            raise ValueError(f"also {self.also!r} {rule}; leave one of them out")
        return weighted

    def _check_type(self, name: str, annotation: str) -> None:
        """Raise ValueError for a value of another type; numbers become Python's int and float."""
        value, (kind, words) = getattr(self, name), VALUE_TYPES[annotation.split(" ")[0]]
        if value is None and annotation.endswith("None"):
            return
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{_words(name)} {value!r} is not {words}; give one")
        if isinstance(value, os.PathLike):
            object.__setattr__(self, name, os.fspath(value))
        if kind in (Real, Integral):  # so that 5, 5.0 and numpy's numbers are recorded alike
            try:
                object.__setattr__(self, name, float(value) if kind is Real else int(value))
            except OverflowError:
                raise ValueError(f"{_words(name)} has {len(str(value))} digits; use a smaller number") from None

    def _check_value(self, each: Field) -> None:
        """Raise ValueError for a value that its field does not allow."""
        value, rules = getattr(self, each.name), each.metadata
        if value is None or not rules:
            return
        if rules["names"] is not None:
            _check_name(each.name, value, rules["names"])
        if rules["valid"] is not None and not rules["valid"](value):
            raise ValueError(f"{_words(each.name)} {value} {rules['rule']}")

    def _check_requirements(self, each: Field) -> None:
        """Raise ValueError for a setting that differs from its default and has no effect here."""
        value, required = getattr(self, each.name), each.metadata.get("requires")
        if value == each.default:
            return
        samplers = [name for name, sampler in SAMPLERS.items() if each.name in sampler.options]
        if samplers and self.sampler not in samplers:
            fix = f"leave it out or use {', '.join(samplers)}"
            raise ValueError(f"{each.name} {value} does not go with sampler {self.sampler}; {fix}")
        if required and getattr(self, required) is None:
            raise ValueError(f"{_words(each.name)} {value} requires {required}; set it, or leave it out")

    def _check_combinations(self) -> None:
        """Raise ValueError for settings that contradict each other."""
        if self.perturbed_scale != 3 and self.guidance_method != "perturbed_attention":
            rule = f"is for perturbed_attention, not {self.guidance_method}; leave it out"
            raise ValueError(f"perturbed scale {self.perturbed_scale} {rule}")
        if self.variance == "learned" and self.guidance_method == "cfg_zero_star":
            raise ValueError("variance learned does not go with cfg_zero_star, whose first steps call no network")
        if self.window is not None:
            check_windows(self.window, self.window // 2 if self.overlap is None else self.overlap)
            if self.reuse > 1:
                raise ValueError(f"reuse {self.reuse} does not go with windows, which share no features; leave one out")
        if not 0 <= self.place < self.batch:
            raise ValueError(f"place {self.place} must be between 0 and batch - 1, and batch is {self.batch}")


def random_seed() -> int:
    """A random seed that is short enough to be read out."""
    return random.SystemRandom().randrange(2**32)


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a number of images is a positive whole number."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{_words(name)} {value!r} must be a whole number, at least 1")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _check_name(kind: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        nearest = did_you_mean(name.lower(), names)
        raise ValueError(f"{kind} {name!r} is unknown; did you mean {nearest}? There are {', '.join(names)}")
