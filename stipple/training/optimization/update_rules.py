"""The config of an optimizer, and the update rules: AdamW, 8-bit AdamW and Muon."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from stipple.training.optimization.learning_rate import SCHEDULES, scheduled_rate
from stipple.training.optimization.muon import Muon

MIN_CHANNELS = 16  # a matrix with fewer on either side maps pixels, latents or logits: AdamW updates it, not Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule and its learning rate."""

    kind: str = "adamw"  # adamw | adamw8bit (moments of one byte; needs bitsandbytes) | muon (AdamW beside it)
    learning_rate: float = 1e-4  # after the warm-up; never scaled by batch size or number of processes
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW; Muon's momentum is 0.95
    weight_decay: float = 0.01  # of matrices and convolutions; biases and norms are not decayed
    epsilon: float = 1e-8  # of AdamW
    warmup_steps: int = 1000  # optimizer steps of linear warm-up
    schedule: str = "constant"  # after the warm-up: constant; cosine or linear, to zero at the last step; or wsd
    decay_steps: int = 0  # of wsd (warm-up, stable, decay): the last steps, in which the rate falls linearly to zero
    adamw_rate: float = 1.0  # of the parameters that AdamW updates beside Muon: learning rate, as a multiple of Muon's
    clip_norm: float = 1.0  # largest norm of the gradient of all parameters together; 0 does not clip

    def __post_init__(self):
        check_rule(self.kind)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule {self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas {self.betas} must be two numbers, at least 0 and below 1")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps {self.warmup_steps} must be at least 0; 0 is no warm-up")
        for name in ("learning_rate", "weight_decay", "decay_steps", "adamw_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} {getattr(self, name)} must not be negative; use at least 0")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of optimizer step `step` (from 0) of `steps`, see `scheduled_rate`."""
        return scheduled_rate(self.schedule, self.learning_rate, step, steps, self.warmup_steps, self.decay_steps)


class Rules(NamedTuple):
    """Optimizers that share the parameters of some modules, and the parameters that are updated through a matrix view.

    Attributes:
        optimizers: of torch or of a library.
        views: parameter -> its view [O, N], which one of the optimizers updates.
    """

    optimizers: list[torch.optim.Optimizer]
    views: dict[nn.Parameter, nn.Parameter]


def adamw(modules: Sequence[nn.Module], config: OptimizerConfig) -> Rules:
    """AdamW (Loshchilov & Hutter 2019), fused: one kernel for all parameters."""
    return Rules([_adamw(trained(modules), config)], {})


def adamw8bit(modules: Sequence[nn.Module], config: OptimizerConfig) -> Rules:
    """AdamW with moments of one byte, quantized in blocks of 256 (Dettmers et al. 2022): a quarter of the memory.

    Tensors of fewer than 4096 numbers keep float32 moments. The rule reads raw memory row by row, so weights are made
    contiguous here: they lose channels_last and, on a CPU, the order that makes convolutions fast.

    Raises:
        ValueError: bitsandbytes does not support the device, or the parameters are partitioned over processes (FSDP).
    """
    import bitsandbytes

    parameters = trained(modules)
    device, supported = parameters[0].device.type, bitsandbytes.supported_torch_devices
    if device not in supported:
        names = ", ".join(sorted(supported))
        raise ValueError(f"optimizer.kind adamw8bit: bitsandbytes does not support {device}, only {names}")
    if isinstance(parameters[0], DTensor):
        raise ValueError("optimizer.kind adamw8bit does not support FSDP; use adamw, whose moments are partitioned")
    for p in parameters:
        p.data = p.data.contiguous()
    groups = _groups(parameters, config)
    return Rules([bitsandbytes.optim.AdamW8bit(groups, config.learning_rate, config.betas, config.epsilon)], {})


def muon(modules: Sequence[nn.Module], config: OptimizerConfig) -> Rules:
    """Muon (Jordan et al. 2024) for matrices between hidden features, AdamW for all other parameters and embeddings.

    Its updates are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning
    rate and one weight decay can serve both; `adamw_rate` gives AdamW another rate. As its authors do, a convolution
    [O, C, h, w] is treated as a matrix [O, C h w].
    """
    parameters = trained(modules)
    embeddings = {id(m.weight) for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
    hidden = [p for p in parameters if p.ndim in (2, 4) and min(p.shape[:2]) >= MIN_CHANNELS]
    matrices = {id(p): p for p in hidden if id(p) not in embeddings}
    views = {p: nn.Parameter(as_matrix(p.detach(), p)) for p in matrices.values() if p.ndim == 4}
    rest = [p for p in parameters if id(p) not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        updated = [views.get(p, p) for p in matrices.values()]
        optimizers.append(Muon(updated, config.learning_rate, config.weight_decay))
    if rest:
        optimizers.append(_adamw(rest, config, config.adamw_rate))
    return Rules(optimizers, views)


RULES = {"adamw": adamw, "adamw8bit": adamw8bit, "muon": muon}


def check_rule(kind: str) -> None:
    """Raise ValueError if the rule is unknown or its library is not installed."""
    if kind not in RULES:
        raise ValueError(f"optimizer.kind {kind!r} is unknown; use one of {', '.join(RULES)}")
    if kind == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer.kind adamw8bit needs bitsandbytes; pip install bitsandbytes, or use adamw")


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained parameters in the order of the modules. The state of an optimizer is indexed by this order."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def as_matrix(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape [O, ...] to [O, N], with columns in the memory order of `like`; for `like` itself, this is a view.

    Orthogonalizing a matrix with permuted columns permutes those of the result, so the order only affects rounding.
    """
    return tensor.permute(0, *_columns(like)).flatten(1)


def from_matrix(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrix`: [O, N] to the shape of `like`, [O, ...]."""
    order = [0, *_columns(like)]
    unfolded = matrix.unflatten(1, [like.shape[i] for i in order[1:]])
    return unfolded.permute([order.index(i) for i in range(like.ndim)])


def _columns(p: torch.Tensor) -> list[int]:
    return sorted(range(1, p.ndim), key=p.stride, reverse=True)


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig, factor: float = 1.0) -> torch.optim.Optimizer:
    """AdamW with `factor` times the learning rate of the run; `Optimizer` reads the factor from the groups."""
    options = {"lr": config.learning_rate * factor, "betas": tuple(config.betas), "eps": config.epsilon}
    groups = [{**group, "factor": factor} for group in _groups(parameters, config)]
    return torch.optim.AdamW(groups, **options, fused=True)


def _groups(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[dict]:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
