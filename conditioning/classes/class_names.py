"""What classes are called: the config of a table of classes, and prompts that are names or numbers to its rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TOLD_AS = ("tokens", "vector")


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """A table of classes that is trained from scratch; a row for no class is appended.

    Raises:
        ValueError: a value breaks a rule; the message names value, rule and mend.
    """

    names: list[str] = field(default_factory=list)  # of the classes; empty: the distinct captions, sorted
    count: int | None = None  # or how many there are, where captions are numbers from 0
    width: int = 512  # of an embedding; LDM's ImageNet models: 512
    encoded_as: str = "tokens"  # tokens: one, read by cross-attention | vector: added to the time embedding

    def __post_init__(self):
        if self.encoded_as not in TOLD_AS:
            raise ValueError(f"classes.told_as {self.told_as!r} is not known; use one of {', '.join(TOLD_AS)}")
        if self.names and self.count is not None:
            raise ValueError("classes.names and classes.count are both given; leave one out")
        for name in ("count", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"classes.{name} {getattr(self, name)} must be at least 1")
        check_names(self.names)


class ClassNames:
    """What the classes of a table are called, in the order of its rows; where there are no names, numbers are all.

    Kept with the training state, as a row means nothing without its name.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self._row = {name.strip().lower(): row for row, name in enumerate(self.names)}

    def row(self, prompt: str) -> int | None:
        """The row of a name, whatever its case, or of a number; None for what is neither."""
        text = prompt.strip().lower()
        return self._row.get(text, int(text) if text.isdecimal() else None)

    def near(self, prompt: str) -> str:
        """The name that is most like a prompt, or what the names are."""
        close = difflib.get_close_matches(prompt.strip().lower(), self._row, n=1)
        return f"did you mean {close[0]!r}?" if close else f"the classes are {', '.join(self.names[:20])}"

    def state_dict(self) -> dict[str, list[str]]:
        """The names."""
        return {"names": self.names}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Take back a `state_dict`."""
        self.__init__(state["names"])


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is blank, or is there twice, whatever the case."""
    known: set[str] = set()
    for name in names:
        if not name.strip() or name.strip().lower() in known:
            raise ValueError(f"class name {name!r:.80} is blank or occurs twice; each class needs a name of its own")
        known.add(name.strip().lower())
