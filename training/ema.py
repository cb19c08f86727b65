"""Exponential moving average of weights, with the warm-up of LDM: decay(n) = min(decay, (1 + n) / (10 + n))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How the averaged weights are made."""

    decay: float = 0.9999  # the decay approached after the warm-up; 0 keeps no average
    warmup: bool = True  # min(decay, (1 + n) / (10 + n)) at update n, so that early weights are forgotten quickly

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay {self.decay} must be at least 0 and below 1")


class Ema:
    """Averaged copies, in float32, of the trainable parameters of a model."""

    def __init__(self, model: nn.Module, config: EmaConfig):
        self.config = config
        self.updates = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone().float() for name, p in self.parameters.items()}

    def decay(self) -> float:
        """The decay of the next update."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * parameter."""
        parameters = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - self.decay())
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._copy(self.averages)
            yield
        finally:
            self._copy(own)

    def state_dict(self) -> dict:
        """Tensors and a count, for `storage.checkpoint.save_state`."""
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Take back a `state_dict`; ValueError when its names are not this model's."""
        if state["averages"].keys() != self.averages.keys():
            differing = sorted(state["averages"].keys() ^ self.averages.keys())
            raise ValueError(f"EMA weights do not fit this model: {', '.join(differing[:5])}")
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])
        self.updates = state["updates"]

    @torch.no_grad()
    def _copy(self, weights: dict[str, torch.Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(weights[name])
