"""Exponential moving average (EMA) of weights, with LDM's warm-up: decay(n) = min(decay, (1 + n) / (10 + n))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from stipple.training.distributed.fsdp import fill, local, rows


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How weights are averaged."""

    decay: float = 0.9999  # after the warm-up; 0 keeps no average
    warmup: bool = True  # min(decay, (1 + n) / (10 + n)) at update n, which forgets early weights quickly
    device: Literal["model", "cpu"] = "model"  # cpu saves 4 bytes per weight on a GPU, for a copy at each step

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay {self.decay} must be at least 0 and below 1")
        if self.device not in ("model", "cpu"):
            raise ValueError(f"ema.device {self.device!r} is unknown; use model or cpu")


class Ema:
    """Averaged float32 copies of the trainable parameters of a model.

    Attributes:
        averages: by name; of a partitioned parameter, the rows that this process holds.
    """

    def __init__(self, model: nn.Module, config: EmaConfig):
        self.config = config
        self.updates = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: self._copied(p).clone() for name, p in self.parameters.items()}

    def decay(self) -> float:
        """The decay of the next update."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * parameter."""
        parameters = [self._copied(p) for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - self.decay())
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the current parameters."""
        for name, p in self.parameters.items():
            self.averages[name].copy_(self._copied(p))
        self.updates = 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model has the averaged weights; afterwards it has its own again, bit for bit."""
        before = {name: local(p.detach()).clone() for name, p in self.parameters.items()}
        try:
            self._set(self.averages)
            yield
        finally:
            self._set(before)

    def state_dict(self) -> dict:
        """Tensors and the number of updates, for `save_state`."""
        averages = {name: rows(average, self.parameters[name]) for name, average in self.averages.items()}
        return {"averages": averages, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`. Raises ValueError if its names are not those of the model."""
        if state["averages"].keys() != self.averages.keys():
            differing = sorted(state["averages"].keys() ^ self.averages.keys())
            raise ValueError(f"EMA weights do not fit this model: {', '.join(differing[:5])}")
        for name, average in self.averages.items():
            fill(average, state["averages"][name], self.parameters[name])
        self.updates = state["updates"]

    def _copied(self, p: nn.Parameter) -> torch.Tensor:
        """Rows of a parameter in float32, on the device of the averages."""
        device = p.device if self.config.device == "model" else "cpu"
        return local(p.detach()).to(device, torch.float32)

    @torch.no_grad()
    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, p in self.parameters.items():
            local(p).copy_(weights[name])
