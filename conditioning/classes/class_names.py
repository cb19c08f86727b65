"""Names of classes: the config of a table of classes, and the mapping from names or numbers to its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stipple_core.nearest import did_you_mean

ENCODINGS = ("tokens", "vector")


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """Options of a table of classes that is trained from scratch; the null class is appended as its last row.

    Raises:
        ValueError: An option is invalid.
    """

    names: list[str] = field(default_factory=list)  # class names; empty: the distinct captions, sorted
    count: int | None = None  # number of classes, if captions are numbers from 0
    width: int = 512  # of the embeddings; LDM's ImageNet models: 512
    told_as: str = "tokens"  # tokens: one token, read by cross-attention | vector: added to the time embedding

    def __post_init__(self):
        if self.told_as not in ENCODINGS:
            raise ValueError(f"classes.told_as {self.told_as!r} is unknown; use one of {', '.join(ENCODINGS)}")
        if self.names and self.count is not None:
            raise ValueError("classes.names and classes.count can't both be set; remove one of them")
        for name in ("count", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"classes.{name} {getattr(self, name)} must be at least 1")
        check_names(self.names)


class ClassNames:
    """Names of the rows of a table, in order; without names, prompts are row numbers.

    A training run stores the names with the weights, because a row has no meaning without its name.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self._row = {name.strip().lower(): row for row, name in enumerate(self.names)}

    def row(self, prompt: str) -> int | None:
        """Return the row of a name, ignoring case, or of a number; None if the prompt is neither."""
        text = prompt.strip().lower()
        return self._row.get(text, int(text) if text.isdecimal() else None)

    def near(self, prompt: str) -> str:
        """Return a hint for an unknown name: the closest name, or a list of the first names."""
        close = did_you_mean(prompt.strip().lower(), self._row, cutoff=0.6)
        return f"did you mean {close!r}?" if close else f"the classes are {', '.join(self.names[:20])}"

    def state_dict(self) -> dict[str, list[str]]:
        """Return the names."""
        return {"names": self.names}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Restore a `state_dict`."""
        self.__init__(state["names"])


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is blank, or that occurs twice (ignoring case)."""
    seen: set[str] = set()
    for name in names:
        if not name.strip() or name.strip().lower() in seen:
            raise ValueError(f"class name {name!r:.80} is blank or occurs twice; each class needs a unique name")
        seen.add(name.strip().lower())
