"""An optimizer whose learning rate is a pure function of the step, with clipping and a guard against bad gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from stipple.training.distributed.fsdp import fill, whole
from stipple.training.optimization.update_rules import (
    RULES,
    OptimizerConfig,
    as_matrix,
    from_matrix,
    trained,
)


class Optimizer:
    """The update rule over the trainable parameters of some modules, with its own loss scale under fp16.

    Attributes:
        rules: optimizers of torch, each with some of the parameters.
        bad_steps: non-finite steps in a row, which were skipped.
    """

    def __init__(
        self, modules: Iterable[nn.Module], config: OptimizerConfig, fp16: bool = False, name: str = "optimizer"
    ):
        modules = list(modules)
        self.name, self.config = name, config
        self.bad_steps = 0
        self.parameters = trained(modules)
        self.rules, self._views = RULES[config.kind](modules, config)
        self._gradients = torch.optim.SGD(self.parameters)  # never steps; lets the scaler find all gradients at once
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=fp16)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss to those of the parameters; under fp16 they are scaled."""
        self.scaler.scale(loss).backward()

    def gradient_norm(self) -> torch.Tensor:
        """Unscale the gradients and return the norm over all parameters; to be called once per step."""
        self.scaler.unscale_(self._gradients)
        return whole(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def step(self, step: int, steps: int, norm: torch.Tensor) -> None:
        """Clip the gradient, update the parameters, and clear the gradients; `norm` has to be finite."""
        if self.config.clip_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        self._update(self.config.rate(step, steps))
        self.bad_steps = 0
        self.scaler.update()
        self._gradients.zero_grad(set_to_none=True)

    def skip(self, losses_finite: bool) -> bool:
        """Clear the gradients without an update; returns whether the step counts as a bad one.

        Under fp16, the loss scale starts too high, is halved until gradients do not overflow, and is doubled from time
        to time. An overflow while losses are finite and the scale can be halved does not count as a bad step.
        """
        searching = self.scaler.is_enabled() and losses_finite and self.scaler.get_scale() > 1
        if self.scaler.is_enabled():  # explicitly, because only one process may have seen the overflow in its rows
            state = self.scaler.state_dict()
            self.scaler.load_state_dict({**state, "_growth_tracker": 0})
            self.scaler.update(state["scale"] * state["backoff_factor"])
        if not searching:
            self.bad_steps += 1
        self._gradients.zero_grad(set_to_none=True)
        return not searching

    def forget(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        """Clear the moments of some rows of a parameter after their values were replaced."""
        moments = self._rule(parameter).state.get(parameter, {})
        for name, moment in moments.items():
            if getattr(moment, "shape", None) == parameter.shape:
                # 8-bit moments (state1, state2) store the code of the value nearest to zero in their map (qmap1, qmap2)
                coded = moment.dtype == torch.uint8
                moment[rows] = int(moments[name.replace("state", "qmap")].abs().argmin()) if coded else 0

    def state_dict(self) -> dict:
        """Tensors and numbers for `save_state`; moments have the shapes of their parameters."""
        moments = {str(i): self._moments(p) for i, p in enumerate(self.parameters)}
        scaler = self.scaler.state_dict()
        return {"kind": self.config.kind, "moments": moments, "scaler": scaler, "bad_steps": self.bad_steps}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`. Betas, weight decay and epsilon stay those of the config, which may have changed."""
        if state["kind"] != self.config.kind:
            raise ValueError(f"its kind is {state['kind']}, not {self.config.kind}")
        if len(state["moments"]) != len(self.parameters):
            raise ValueError(f"it is of {len(state['moments'])} parameters, not {len(self.parameters)}")
        for i, p in enumerate(self.parameters):
            moments = state["moments"][str(i)]
            if moments:
                updated = self._views.get(p, p)
                self._rule(p).state[updated] = {name: self._restored(value, p) for name, value in moments.items()}
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
        updated = self._views.get(p, p)
        return next(r for r in self.rules for group in r.param_groups for q in group["params"] if q is updated)

    def _moments(self, p: nn.Parameter) -> dict:
        moments = self._rule(p).state.get(self._views.get(p, p), {})
        return {name: from_matrix(value, p) if p in self._views else value for name, value in moments.items()}

    def _restored(self, value: Any, p: nn.Parameter) -> Any:
        """A saved moment in the memory order of its parameter, which rules that read raw memory require."""
        if not hasattr(value, "shape"):
            return value
        like = p if value.shape == p.shape else torch.empty(value.shape, device=p.device)
        moment = fill(torch.empty_like(like, dtype=value.dtype, requires_grad=False), value)
        return as_matrix(moment, p) if p in self._views else moment
