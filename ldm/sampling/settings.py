"""All that decides a picture, besides the model: the settings that are checked, recorded, and made again."""

from __future__ import annotations

import difflib
import math
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from PIL import Image

from ldm.denoising.windows import check as check_windows
from ldm.guidance.registry import GUIDANCES, GuidanceConfig
from ldm.samplers.onestep import VARIANCES
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import SPACINGS

MAX_FEATHER = 512
MAX_BACK_PROJECTION = 100
MAX_BATCH = 256  # a record read from a picture must not eat the memory
SEEDS = 2**64  # torch's generators take a seed below this
Source = str | Image.Image  # a file's path, or from Python a picture of PIL, which no record can hold
KINDS = {
    "str": (str, "text"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "Source": ((str, os.PathLike, Image.Image), "the path of a file"),
}
OF_IMAGES = {  # settings that say something of a picture that is given, and which one
    "mask": "image",
    "strength": "image",
    "noise_level": "image",
    "back_projection": "image",
    "resample": "mask",
    "feather": "mask",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides one picture, besides the model, the precision and the machine.

    Raises:
        ValueError: in one line naming value, rule and mend, for what is wrong with any model.
    """

    prompt: str = ""  # what the picture shows; "": whatever the model likes
    negative_prompt: str = ""  # what guidance leads away from
    also: str = ""  # what else the picture shows: a line each of a weight and a prompt; below 0 leads away
    guidance_scale: float = 5.0  # 1: no guidance; above: closer to the prompt, less variety
    guidance_method: str = "classifier_free"  # a key of GUIDANCES
    guidance_rescale: float = 0.0  # share of the contrast that guidance adds, which is taken back
    guidance_start: float = 1.0  # guided at times from here (1: noise)
    guidance_stop: float = 0.0  # down to here (0: the picture)
    guidance_bound: float | None = None  # largest absolute value of estimated latents; None: there is no bound
    guidance_percentile: float | None = None  # of each estimate, which is scaled to the bound; None: it is clipped
    guidance_norm: float | None = None  # of apg: longest difference that an image is guided by; None: any
    perturbed_scale: float = 3.0  # of perturbed_attention
    classifier_scale: float = 0.0  # of the gradient of a classifier of noisy latents; 0: there is none
    classifier_class: str = ""  # the class that it leads to; "": the prompt names it
    clip_scale: float = 0.0  # of the gradient of a CLIP; 0: there is none
    clip_prompt: str = ""  # the text that it leads to; "": the prompt
    steps: int = 50  # of the sampler
    sampler: str = "ddim"  # a key of SAMPLERS
    eta: float = 0.0  # of ddim: share of the noise that is drawn anew at each step
    churn: float = 0.0  # of heun: noise added and taken away again, over all steps (Karras et al. 2022: 0 to 100)
    variance: str = "small"  # of ddpm: small, large, or learned by the model
    corrections: int | None = None  # of langevin, predictor_corrector: Langevin steps at each level; None: theirs
    tolerance: float = 1e-3  # of ode: largest error of a step, relative and absolute
    spacing: str | None = None  # how the sampler chooses its times, a key of SPACINGS; None: its habit
    shift: float | None = None  # of rectified flow's times: above 1 more at high noise; None: as trained
    image: Source | None = None  # what the picture is made from: changed, completed, enlarged or imitated
    mask: Source | None = None  # of the image: white is to be painted
    map: Source | None = None  # class numbers or depths of each pixel, for models that read one
    strength: float | None = None  # share of the steps, from the noised image on; 1: from noise; None: see `planning`
    resample: int = 1  # with a mask: how often each part of the walk is walked, to make the new fit the old; 10 is much
    feather: int = 0  # with a mask: pixels around it in which the new fades into the old
    noise_level: float = 0.0  # noise added to the image, for models that were trained so; 0 to 1
    back_projection: int | None = None  # rounds that make an enlarged picture shrink to the image; None: the model's
    reuse: int = 1  # compute the inner layers of the UNet at every so many network calls; above 1 is not exact
    height: int | None = None  # pixels; None: as trained
    width: int | None = None  # pixels; None: as trained
    window: int | None = None  # latents along one side of what the UNet takes at once; None: all of them
    overlap: int | None = None  # latents that neighboring windows share; None: half of a window
    seed: int = 42  # of the picture's own generator
    batch: int = 1  # pictures that are computed together, on which the last bits of each may depend
    place: int = 0  # of the picture among them

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name, field.type)
        _check_name("sampler", self.sampler, SAMPLERS)
        if self.spacing is not None:
            _check_name("spacing", self.spacing, SPACINGS)
        self.guidance()
        self.prompts()
        for name in ("classifier_scale", "clip_scale"):
            if not math.isfinite(getattr(self, name)):
                words = name.replace("_", " ")
                raise ValueError(f"{words} {getattr(self, name)} must be a finite number; 0 is none, 1 to 10 usual")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1; 20 to 50 are usual")
        self._check_options()
        self._check_given()
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ValueError(f"shift {self.shift} must be a positive number; 1 is none, 3 usual for large pictures")
        if self.reuse < 1:
            raise ValueError(f"reuse {self.reuse} must be at least 1, which is exact; 2 and 3 are usual")
        self._check_windows()
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed {self.seed} must be between 0 and 2^64 - 1; -1 alone draws one at random")
        if self.batch > MAX_BATCH:
            raise ValueError(f"batch {self.batch} is more than {MAX_BATCH} pictures computed together; use less")
        if not 0 <= self.place < self.batch:
            raise ValueError(f"place {self.place} must be between 0 and batch - 1, and batch is {self.batch}")

    def guidance(self) -> GuidanceConfig:
        """How the picture is guided. Raises ValueError."""
        named = {f"guidance_{field.name}": field.name for field in fields(GuidanceConfig)}
        named["perturbed_scale"] = "perturbed_scale"
        return GuidanceConfig(**{named[f.name]: getattr(self, f.name) for f in fields(self) if f.name in named})

    def prompts(self) -> list[tuple[str, float]]:
        """The prompt of weight 1 and all others with theirs. Raises ValueError where there is no number."""
        found = [(self.prompt, 1.0)]
        for line in filter(str.strip, self.also.split("\n")):
            weight, _, prompt = line.strip().partition(" ")
            try:
                found.append((prompt.strip(), float(weight)))
            except ValueError:
                raise ValueError(f'also {line!r} must be a weight and a prompt, as in "0.5 a blue fish"') from None
            if not prompt.strip() or not math.isfinite(found[-1][1]):
                raise ValueError(f'also {line!r} must be a finite weight and a prompt, as in "0.5 a blue fish"')
        if len(found) > 1 and (self.guidance_method != "classifier_free" or self.guidance_rescale):
            mend = "goes with guidance method classifier_free and no guidance rescale"
            raise ValueError(f"also {self.also!r} {mend}; leave one of them out")
        return found

    def _check_options(self) -> None:
        """Raise ValueError for a sampler's option that is out of range, or given to a sampler that has it not."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta} must be between 0 (nothing is drawn anew) and 1")
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn {self.churn} must be 0 (nothing is added) or a positive number; 40 is usual")
        _check_name("variance", self.variance, VARIANCES)
        if self.perturbed_scale != 3 and self.guidance_method != "perturbed_attention":
            method = self.guidance_method
            raise ValueError(
                f"perturbed scale {self.perturbed_scale} is for perturbed_attention, not {method}; leave it out"
            )
        if self.variance == "learned" and self.guidance_method == "cfg_zero_star":
            raise ValueError("variance learned does not go with cfg_zero_star, which asks no network at first")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance {self.tolerance} must be between 0 and 1; 0.001 is usual")
        for field in fields(self):
            value = getattr(self, field.name)
            takers = [name for name, sampler in SAMPLERS.items() if field.name in sampler.options]
            if takers and value != field.default and self.sampler not in takers:
                mend = f"leave it out or use {', '.join(takers)}"
                raise ValueError(f"{field.name} {value} does not go with sampler {self.sampler}; {mend}")

    def _check_given(self) -> None:
        """Raise ValueError for what is said of a picture and out of range, or of none."""
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength} must be above 0 (the image stays) and at most 1 (from noise)")
        if self.resample < 1:
            raise ValueError(f"resample {self.resample} must be at least 1, which walks once; 5 to 10 are usual")
        if not 0 <= self.feather <= MAX_FEATHER:
            rule = f"must be between 0 pixels, a hard seam, and {MAX_FEATHER}"
            raise ValueError(f"feather {self.feather} {rule}; 4 to 16 are usual")
        if not 0 <= self.noise_level <= 1:
            raise ValueError(f"noise level {self.noise_level} must be between 0 (none) and 1")
        if self.back_projection is not None and not 0 <= self.back_projection <= MAX_BACK_PROJECTION:
            rule = f"must be between 0 (none) and {MAX_BACK_PROJECTION}"
            raise ValueError(f"back projection {self.back_projection} {rule}; 3 rounds are usual")
        for field in fields(self):
            whose, value = OF_IMAGES.get(field.name), getattr(self, field.name)
            if whose and value != field.default and getattr(self, whose) is None:
                name = f"{field.name.replace('_', ' ')} {value}"
                raise ValueError(f"{name} goes with a given {whose}, and there is none; give one, or leave it out")

    def _check_windows(self) -> None:
        """Raise ValueError for windows that can't be."""
        if self.window is None:
            if self.overlap is not None:
                raise ValueError(f"overlap {self.overlap} is of windows; give a window too, or leave it out")
            return
        check_windows(self.window, self.window // 2 if self.overlap is None else self.overlap)
        if self.reuse > 1:
            raise ValueError(f"reuse {self.reuse} does not go with windows, which share no features; leave one out")

    def _check_type(self, name: str, annotation: str) -> None:
        value, (kind, words) = getattr(self, name), KINDS[annotation.split(" ")[0]]
        if value is None and annotation.endswith("None"):
            return
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name.replace('_', ' ')} {value!r} is not {words}; give one")
        if isinstance(value, os.PathLike):
            object.__setattr__(self, name, os.fspath(value))
        if kind in (Real, Integral):  # 5 and 5.0, or numpy's numbers, are to be written alike
            try:
                object.__setattr__(self, name, float(value) if kind is Real else int(value))
            except OverflowError:
                raise ValueError(
                    f"{name.replace('_', ' ')} has {len(str(value))} digits; use a smaller number"
                ) from None


def with_usual_scale(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are given, with the guidance scale of a method that has its own, where none is given."""
    method = values.get("guidance_method")
    guidance = GUIDANCES.get(method) if isinstance(method, str) else None
    usual = {} if guidance is None or guidance.default is None else {"guidance_scale": guidance.default}
    return usual | dict(values)


def random_seed() -> int:
    """A seed that nobody chose, short enough to be read out."""
    return random.SystemRandom().randrange(2**32)


def _check_name(kind: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"{kind} {name!r} is unknown; did you mean {nearest}? There are {', '.join(names)}")
