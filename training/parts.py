"""The parts that a run consists of: whatever has a state to save and restore, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage.state import whole_state
from training.ema import Ema
from training.optimizer import Optimizer
from training.sharding import ShardedWeights

READERS_OF_ROWS = (Optimizer, Ema, ShardedWeights)  # parts that read, of a tensor on disk, only what they hold


class Parts(dict[str, Any]):
    """Name -> anything with state_dict() and load_state_dict(): models, optimizers, averages, tokenizers."""

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts, for `storage.checkpoint.save_state`."""
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, states: dict[str, Any], source: Path) -> None:
        """Give each part its state; ValueError, naming the checkpoint `source`, where one does not fit."""
        for name, part in self.items():
            try:
                part.load_state_dict(states[name] if isinstance(part, READERS_OF_ROWS) else whole_state(states[name]))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(
                    f"{source} is of another configuration ({name} does not fit: {str(error).splitlines()[0]}); "
                    "choose another `run`, or begin this one anew with --no-resume, which removes what is there"
                ) from error


@dataclass(frozen=True)
class Watched:
    """A part whose state is only compared; a change is said, and does not end the run."""

    name: str  # such as "images and captions"
    value: str
    say: Callable[[str], None]

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        if state["value"] != self.value:
            self.say(f"warning: the {self.name} changed since the run was stopped: not the same run any more")
