"""Suggestions for misspelled names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.0) -> str:
    """Return the choice that is most similar to `name`, or "" if none has at least the similarity `cutoff`.

    Args:
        name: what the user wrote.
        choices: the valid names.
        cutoff: a similarity in [0, 1], as in `difflib.get_close_matches`. 0 returns some choice whenever there is one.
    """
    return next(iter(difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)), "")
