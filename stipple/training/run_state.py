"""The parts that a run consists of: whatever has a state to save and restore, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stipple.training.distributed.fsdp import FsdpWeights
from stipple.training.optimization.ema import Ema
from stipple.training.optimization.optimizer import Optimizer
from stipple_core.files.training_state import IncompleteTensor, whole_state

READERS_OF_ROWS = (Optimizer, Ema, FsdpWeights)  # parts that read, of a tensor on disk, only what they hold
SHOWN = 5  # weights named where a network is of another shape
MEND = "choose another `run`, or begin this one anew with --no-resume, which removes what is there"


class RunState(dict[str, Any]):
    """Name -> anything with state_dict() and load_state_dict(): models, optimizers, averages, tokenizers."""

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts, for `stipple_core.files.checkpoint_folder.save_state`."""
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, states: dict[str, Any], source: Path) -> None:
        """Give each part its state; ValueError, naming the checkpoint `source`, where one does not fit.

        A state without its part, as of a text encoder that learns no more, is refused as a part without its state is.
        """
        other = f"{source} is of another configuration"
        if differing := sorted(self.keys() ^ states.keys()):
            told = ", ".join(f"{name} is only in {'the run' if name in self else 'it'}" for name in differing)
            raise ValueError(f"{other} ({told}); {MEND}")
        for name, part in self.items():
            try:
                part.load_state_dict(states[name] if isinstance(part, READERS_OF_ROWS) else whole_state(states[name]))
            except torch.OutOfMemoryError:
                raise
            except IncompleteTensor as error:
                raise ValueError(f"{source} is not whole ({error}); remove it, and the one before it is used") from None
            except (RuntimeError, ValueError, KeyError) as error:
                told = _differences(part, states[name]) or " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"{other} ({name} does not fit: {told}); {MEND}") from error


def _differences(part: Any, state: dict[str, Any]) -> str:
    """The first five weights that a network and a state of one do not have alike; "" where it is no network."""
    if not isinstance(part, nn.Module | FsdpWeights) or not isinstance(state, dict):
        return ""
    shapes = ({name: list(getattr(x, "shape", ())) for name, x in each.items()} for each in (part.state_dict(), state))
    own, other = shapes
    names = [name for name in own | other if own.get(name) != other.get(name)]
    told = [f"{name} is {own.get(name, 'not')} in the run, {other.get(name, 'not')} in it" for name in names[:SHOWN]]
    return "; ".join(told) + f"; and {len(names) - SHOWN} more" * (len(names) > SHOWN)


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
