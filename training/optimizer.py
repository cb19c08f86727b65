"""AdamW whose learning rate is a pure function of the step, with clipping and a guard against non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its learning rate."""

    learning_rate: float = 1e-4  # after the warm-up; never scaled behind your back by batch or processes
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01  # of matrices and convolutions; biases and norms are not decayed
    epsilon: float = 1e-8
    warmup_steps: int = 1000  # optimizer steps of linear warm-up
    schedule: str = "constant"  # after the warm-up: constant, cosine or linear (both to zero at the last step)
    clip_norm: float = 1.0  # largest norm of the gradient of all parameters together; 0 does not clip

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule {self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas {self.betas} must be two numbers, at least 0 and below 1")
        if self.learning_rate < 0 or self.weight_decay < 0:
            raise ValueError("optimizer.learning_rate and optimizer.weight_decay must not be negative")


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES = {"constant": lambda progress: 1.0, "cosine": _cosine, "linear": lambda progress: 1 - progress}


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * SCHEDULES[config.schedule](min(1.0, progress))


class Optimizer:
    """One AdamW over the trainable parameters of some modules, with its own fp16 loss scale where that is used."""

    def __init__(
        self, modules: Iterable[nn.Module], config: OptimizerConfig, fp16: bool = False, name: str = "optimizer"
    ):
        self.name, self.config = name, config
        self.bad_steps = 0  # in a row, left out because the gradient was not finite
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate, betas=tuple(config.betas), eps=config.epsilon, fused=True,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=fp16)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss to the parameters' (scaled, under fp16)."""
        self.scaler.scale(loss).backward()

    def step(self, step: int, steps: int) -> tuple[torch.Tensor, bool]:
        """Clip, update, clear the gradients.

        Returns the gradient norm before clipping, and whether the update was made: a norm that is not finite leaves
        weights and moments as they were.
        """
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, step, steps)
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = bool(torch.isfinite(norm))
        if finite:
            if self.config.clip_norm > 0:
                nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
            self.scaler.step(self.adamw)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.scaler.update()  # halves the loss scale after a step that was not finite
        self.adamw.zero_grad(set_to_none=True)
        return norm, finite

    def forget(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        """Clear the moments of some rows of a parameter, which were set to something else."""
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in self.adamw.state[parameter]:
                self.adamw.state[parameter][moment][rows] = 0

    def state_dict(self) -> dict:
        """Tensors and numbers, for `storage.checkpoint.save_state`."""
        return {"adamw": self.adamw.state_dict(), "scaler": self.scaler.state_dict(), "bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict) -> None:
        """Take back a `state_dict`; betas, decay and epsilon are those of the config, which may have been changed."""
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({**state["adamw"], "param_groups": groups})
        self.bad_steps = state["bad_steps"]
        for p, moments in self.adamw.state.items():
            for name, value in moments.items():
                if value.shape == p.shape:  # fused AdamW walks raw memory: moments must lie as their parameter does
                    moments[name] = torch.empty_like(p).copy_(value)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
