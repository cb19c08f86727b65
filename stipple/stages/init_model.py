"""The model that `init_from` names, opened once per run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class InitModel(Generic[T]):
    """Opens the model that `init_from` names at its first use, and returns the same object afterwards.

    The config of a run and its networks both depend on that model, so one instance is passed to all of them.

    Args:
        open_path: opens the model at a path.
    """

    def __init__(self, open_path: Callable[[str], T]):
        self._open_path = open_path
        self._path: str | None = None
        self._model: T | None = None

    def open(self, path: str | None) -> T | None:
        """Return the model at `path`, or None if there is no path."""
        if path is None:
            return None
        if path != self._path:
            self._model = self._open_path(path)
            self._path = path
        return self._model

    def release(self) -> None:
        """Forget the model, so that the memory that the run does not share with it is freed."""
        self._path = self._model = None
