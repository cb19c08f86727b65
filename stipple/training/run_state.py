"""The state of a run: its parts by name, saved to and restored from checkpoints."""

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

READERS_OF_ROWS = (Optimizer, Ema, FsdpWeights)  # parts that read only their own rows of a tensor on disk
SHOWN = 5  # differing weights that are named
FIX = "choose another `run`, or start this one again with --no-resume, which removes its checkpoints"


class RunState(dict[str, Any]):
    """Name -> anything with state_dict() and load_state_dict(): models, optimizers, averages, tokenizers."""

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts, for `save_state`."""
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, states: dict[str, Any], source: Path) -> None:
        """Restore the state of each part from the checkpoint `source`.

        Raises:
            ValueError: the checkpoint has other parts than the run, or the state of a part does not fit.
        """
        other = f"{source} is of another configuration"
        if differing := sorted(self.keys() ^ states.keys()):
            listed = ", ".join(f"{name} is only in {'the run' if name in self else 'it'}" for name in differing)
            raise ValueError(f"{other} ({listed}); {FIX}")
        for name, part in self.items():
            try:
                part.load_state_dict(states[name] if isinstance(part, READERS_OF_ROWS) else whole_state(states[name]))
            except torch.OutOfMemoryError:
                raise
            except IncompleteTensor as error:
                raise ValueError(
                    f"{source} is incomplete ({error}); remove it to use the checkpoint before it"
                ) from None
            except (RuntimeError, ValueError, KeyError) as error:
                reason = _differences(part, states[name]) or " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"{other} ({name} does not fit: {reason}); {FIX}") from error


def _differences(part: Any, state: dict[str, Any]) -> str:
    """The first five weights that differ between a network and a state of one; "" for other parts."""
    if not isinstance(part, nn.Module | FsdpWeights) or not isinstance(state, dict):
        return ""
    own, saved = (
        {name: list(getattr(x, "shape", ())) for name, x in weights.items()} for weights in (part.state_dict(), state)
    )
    names = [name for name in own | saved if own.get(name) != saved.get(name)]
    listed = [f"{name} is {own.get(name, 'not')} in the run, {saved.get(name, 'not')} in it" for name in names[:SHOWN]]
    return "; ".join(listed) + f"; and {len(names) - SHOWN} more" * (len(names) > SHOWN)


@dataclass(frozen=True)
class Watched:
    """A value that a run depends on; if it differs from that in a checkpoint, the run warns and continues."""

    name: str  # such as "images and captions"
    value: str
    warn: Callable[[str], None]

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        if state["value"] != self.value:
            self.warn(f"warning: the {self.name} changed since the run was stopped; results may differ")
