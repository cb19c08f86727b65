"""All that decides a picture, besides the model: the settings that are checked, recorded, and made again."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from numbers import Integral, Real

from ldm.samplers import SAMPLERS
from ldm.times import SPACINGS

MAX_BATCH = 256  # a record read from a picture must not eat the memory
SEEDS = 2**64  # torch's generators take a seed below this
KINDS = {"str": (str, "text"), "int": (Integral, "a whole number"), "float": (Real, "a number")}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides one picture, besides the model, the precision and the machine.

    Raises:
        ValueError: in one line naming value, rule and mend, for what is wrong with any model.
    """

    prompt: str = ""  # what the picture shows; "": whatever the model likes
    negative_prompt: str = ""  # what guidance leads away from
    guidance_scale: float = 5.0  # 1: no guidance; above: closer to the prompt, less variety
    guidance_rescale: float = 0.0  # share of the contrast that guidance adds, which is taken back
    steps: int = 50  # of the sampler
    sampler: str = "ddim"  # a key of SAMPLERS
    eta: float = 0.0  # share of the noise that is drawn anew at each step, by samplers that have the choice
    spacing: str | None = None  # how the sampler chooses its times, a key of SPACINGS; None: its habit
    height: int | None = None  # pixels; None: as trained
    width: int | None = None  # pixels; None: as trained
    seed: int = 42  # of the picture's own generator
    batch: int = 1  # pictures that are computed together, on which the last bits of each may depend
    place: int = 0  # of the picture among them

    def __post_init__(self) -> None:
        for field in fields(self):
            self._check_type(field.name, field.type)
        _check_name("sampler", self.sampler, SAMPLERS)
        if self.spacing is not None:
            _check_name("spacing", self.spacing, SPACINGS)
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance scale {self.guidance_scale} is not a finite number; 1 is none, 2 to 10 usual")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance rescale {self.guidance_rescale} must be between 0 (off) and 1; 0.7 is usual")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1; 20 to 50 are usual")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta} must be between 0 (nothing is drawn anew) and 1")
        if self.eta and "eta" not in SAMPLERS[self.sampler].options:
            takers = ", ".join(name for name, sampler in SAMPLERS.items() if "eta" in sampler.options)
            raise ValueError(f"eta {self.eta} does not go with sampler {self.sampler}; leave it out or use {takers}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed {self.seed} must be between 0 and 2^64 - 1; -1 alone draws one at random")
        if self.batch > MAX_BATCH:
            raise ValueError(f"batch {self.batch} is more than {MAX_BATCH} pictures computed together; use less")
        if not 0 <= self.place < self.batch:
            raise ValueError(f"place {self.place} must be between 0 and batch - 1, and batch is {self.batch}")

    def _check_type(self, name: str, annotation: str) -> None:
        value, (kind, words) = getattr(self, name), KINDS[annotation.split(" ")[0]]
        if value is None and annotation.endswith("None"):
            return
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name.replace('_', ' ')} {value!r} is not {words}; give one")
        if kind is not str:  # 5 and 5.0, or numpy's numbers, are to be written alike
            object.__setattr__(self, name, float(value) if kind is Real else int(value))


def random_seed() -> int:
    """A seed that nobody chose, short enough to be read out."""
    return random.SystemRandom().randrange(2**32)


def _check_name(kind: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"{kind} {name!r} is unknown; did you mean {nearest}? There are {', '.join(names)}")
