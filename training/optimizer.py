"""An optimizer whose learning rate is a pure function of the step, with clipping and a guard against bad gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from training.sharding import fill, whole
from training.update_rules import RULES, as_matrix, check_rule, from_matrix, trained


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The rule of the updates and its learning rate."""

    kind: str = "adamw"  # adamw | adamw8bit (moments of one byte; needs bitsandbytes) | muon (AdamW beside it)
    learning_rate: float = 1e-4  # after the warm-up; never scaled behind your back by batch or processes
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW; Muon's momentum is 0.95
    weight_decay: float = 0.01  # of matrices and convolutions; biases and norms are not decayed
    epsilon: float = 1e-8  # of AdamW
    warmup_steps: int = 1000  # optimizer steps of linear warm-up
    schedule: str = "constant"  # after the warm-up: constant; cosine or linear, to zero at the last step; or wsd
    decay_steps: int = 0  # of wsd (warm-up, stable, decay): the last steps, in which the rate falls linearly to zero
    adamw_rate: float = 1.0  # of what AdamW has beside Muon: its learning rate as a multiple of Muon's
    clip_norm: float = 1.0  # largest norm of the gradient of all parameters together; 0 does not clip

    def __post_init__(self):
        check_rule(self.kind)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule {self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas {self.betas} must be two numbers, at least 0 and below 1")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps {self.warmup_steps} must be at least 0, which is no warm-up")
        for name in ("learning_rate", "weight_decay", "decay_steps", "adamw_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} {getattr(self, name)} must not be negative")


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


SCHEDULES = {"constant": lambda progress: 1.0, "cosine": _cosine, "linear": _linear, "wsd": _linear}


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    That of wsd does not depend on `steps` until the decay begins: such a run can be lengthened or ended at any time
    (Hu et al. 2024, arXiv:2404.06395, section 4).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    first = config.warmup_steps
    if config.schedule == "wsd":
        first = max(first, steps - config.decay_steps)
    progress = (step - first) / max(1, steps - first)
    return config.learning_rate * SCHEDULES[config.schedule](min(1.0, max(0.0, progress)))


class Optimizer:
    """The rule over the trainable parameters of some modules, with its own fp16 loss scale where that is used.

    Attributes:
        rules: torch's optimizers, each with some of the parameters.
    """

    def __init__(
        self, modules: Iterable[nn.Module], config: OptimizerConfig, fp16: bool = False, name: str = "optimizer"
    ):
        modules = list(modules)
        self.name, self.config = name, config
        self.bad_steps = 0  # in a row, left out because a loss or a gradient was not finite
        self.parameters = trained(modules)
        self.rules, self._views = RULES[config.kind](modules, config)
        self._gradients = torch.optim.SGD(self.parameters)  # never steps: for the scaler to find all gradients at once
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=fp16)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss to the parameters' (scaled, under fp16)."""
        self.scaler.scale(loss).backward()

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the gradient of all parameters together, whose loss scale is taken out; once per step."""
        self.scaler.unscale_(self._gradients)
        return whole(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def step(self, step: int, steps: int, norm: torch.Tensor) -> None:
        """Clip a gradient whose norm is finite, update, clear the gradients."""
        if self.config.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        self._update(learning_rate(self.config, step, steps))
        self.bad_steps = 0
        self.scaler.update()
        self._gradients.zero_grad(set_to_none=True)

    def leave_out(self, losses_finite: bool) -> bool:
        """Clear the gradients instead, with weights and moments as they were; returns whether the step was a bad one.

        Under fp16 the loss scale begins too high and is halved until gradients no longer overflow, and is doubled again
        at times: as long as there is a scale to halve and the losses are finite, that is no bad step.
        """
        searching = self.scaler.is_enabled() and losses_finite and self.scaler.get_scale() > 1
        if self.scaler.is_enabled():  # by hand: of several processes one alone may have seen the overflow in its rows
            state = self.scaler.state_dict()
            self.scaler.load_state_dict({**state, "_growth_tracker": 0})
            self.scaler.update(state["scale"] * state["backoff_factor"])
        if not searching:
            self.bad_steps += 1
        self._gradients.zero_grad(set_to_none=True)
        return not searching

    def forget(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        """Clear the moments of some rows of a parameter, which were set to something else."""
        moments = self._rule(parameter).state.get(parameter, {})
        for name, moment in moments.items():
            if getattr(moment, "shape", None) == parameter.shape:
                # of 8 bits (state1, state2): the code of what is nearest to zero in their map (qmap1, qmap2)
                coded = moment.dtype == torch.uint8
                moment[rows] = int(moments[name.replace("state", "qmap")].abs().argmin()) if coded else 0

    def state_dict(self) -> dict:
        """Tensors and numbers, for `storage.checkpoint.save_state`; a moment has the shape of its parameter."""
        moments = {str(i): self._moments(p) for i, p in enumerate(self.parameters)}
        scaler = self.scaler.state_dict()
        return {"kind": self.config.kind, "moments": moments, "scaler": scaler, "bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict) -> None:
        """Take back a `state_dict`; betas, decay and epsilon are those of the config, which may have been changed."""
        if state["kind"] != self.config.kind:
            raise ValueError(f"its kind is {state['kind']}, not {self.config.kind}")
        if len(state["moments"]) != len(self.parameters):
            raise ValueError(f"it is of {len(state['moments'])} parameters, not {len(self.parameters)}")
        for i, p in enumerate(self.parameters):
            moments = state["moments"][str(i)]
            if moments:
                known = self._views.get(p, p)
                self._rule(p).state[known] = {name: self._laid(value, p) for name, value in moments.items()}
        self.bad_steps = state["bad_steps"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _update(self, rate: float) -> None:
        for p, view in self._views.items():
            view.grad = None if p.grad is None else as_matrix(p.grad, p)
        for rule in self.rules:
            for group in rule.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            rule.step()
        for view in self._views.values():
            view.grad = None

    def _rule(self, p: nn.Parameter) -> torch.optim.Optimizer:
        known = self._views.get(p, p)
        return next(r for r in self.rules for group in r.param_groups for q in group["params"] if q is known)

    def _moments(self, p: nn.Parameter) -> dict:
        moments = self._rule(p).state.get(self._views.get(p, p), {})
        return {name: from_matrix(value, p) if p in self._views else value for name, value in moments.items()}

    def _laid(self, value: Any, p: nn.Parameter) -> Any:
        """A saved moment as the rule wants it: rules walk raw memory, so moments must lie as their parameter does."""
        if not hasattr(value, "shape"):
            return value
        like = p if value.shape == p.shape else torch.empty(value.shape, device=p.device)
        moment = fill(torch.empty_like(like, dtype=value.dtype, requires_grad=False), value)
        return as_matrix(moment, p) if p in self._views else moment
