"""The rules by which gradients move weights: AdamW, AdamW with moments of 8 bits, and Muon."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from training.muon import Muon

if TYPE_CHECKING:
    from training.optimizer import OptimizerConfig

FEWEST_CHANNELS = 16  # below, on either side, a matrix maps from or to pixels, latents or logits: AdamW's, not Muon's


class Rules(NamedTuple):
    """Optimizers that share the parameters of some modules, and those parameters that one knows by a view [O, N]."""

    optimizers: list[torch.optim.Optimizer]
    views: dict[nn.Parameter, nn.Parameter]


def adamw(modules: Sequence[nn.Module], config: OptimizerConfig) -> Rules:
    """AdamW (Loshchilov & Hutter 2019), fused: one kernel for all parameters."""
    return Rules([_adamw(trained(modules), config)], {})


def adamw8bit(modules: Sequence[nn.Module], config: OptimizerConfig) -> Rules:
    """AdamW with moments of one byte, quantized in blocks of 256 (Dettmers et al. 2022): a quarter of the memory.

    Tensors of fewer than 4096 numbers keep float32 moments. It walks raw memory row by row, so weights are laid out
    that way here: they lose channels_last, and on a CPU the order that makes convolutions fast.

    Raises:
        ValueError: bitsandbytes does not know the device, or the parameters are sharded, which it can't take.
    """
    import bitsandbytes

    parameters = trained(modules)
    device, known = parameters[0].device.type, bitsandbytes.supported_torch_devices
    if device not in known:
        raise ValueError(f"optimizer.kind adamw8bit: bitsandbytes has no {device}, only {', '.join(sorted(known))}")
    if isinstance(parameters[0], DTensor):
        raise ValueError("optimizer.kind adamw8bit can't be sharded (FSDP); use adamw: its moments are sharded")
    for p in parameters:
        p.data = p.data.contiguous()
    groups = _groups(parameters, config)
    return Rules([bitsandbytes.optim.AdamW8bit(groups, config.learning_rate, config.betas, config.epsilon)], {})


def muon(modules: Sequence[nn.Module], config: OptimizerConfig) -> Rules:
    """Muon (Jordan et al. 2024) for matrices between hidden features, AdamW for all else, embeddings too.

    Its updates are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning
    rate and one weight decay serve both. A convolution [O, C, h, w] is taken as a matrix [O, C h w], as its authors do.
    """
    parameters = trained(modules)
    embeddings = {id(m.weight) for module in modules for m in module.modules() if isinstance(m, nn.Embedding)}
    hidden = [p for p in parameters if p.ndim in (2, 4) and min(p.shape[:2]) >= FEWEST_CHANNELS]
    matrices = {id(p): p for p in hidden if id(p) not in embeddings}
    views = {p: nn.Parameter(as_matrix(p.detach(), p)) for p in matrices.values() if p.ndim == 4}
    rest = [p for p in parameters if id(p) not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        known = [views.get(p, p) for p in matrices.values()]
        optimizers.append(Muon(known, config.learning_rate, config.weight_decay))
    if rest:
        optimizers.append(_adamw(rest, config, config.adamw_rate))
    return Rules(optimizers, views)


RULES = {"adamw": adamw, "adamw8bit": adamw8bit, "muon": muon}


def check_rule(kind: str) -> None:
    """Raise ValueError where there is no such rule, or its library is not installed."""
    if kind not in RULES:
        raise ValueError(f"optimizer.kind {kind!r} is unknown; use one of {', '.join(RULES)}")
    if kind == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer.kind adamw8bit needs bitsandbytes; pip install bitsandbytes, or use adamw")


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters that learn, in the order of the modules: what the state of an optimizer is counted by."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def as_matrix(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor [O, ...] as [O, N], its columns in the order in which `like` lies in memory: of `like` itself a view.

    To orthogonalize a matrix of permuted columns is to permute those of the result, so the order is a matter of
    rounding alone.
    """
    return tensor.permute(0, *_columns(like)).flatten(1)


def from_matrix(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrix`: [O, N] in the shape of `like`, [O, ...]."""
    order = [0, *_columns(like)]
    unfolded = matrix.unflatten(1, [like.shape[i] for i in order[1:]])
    return unfolded.permute([order.index(i) for i in range(like.ndim)])


def _columns(p: torch.Tensor) -> list[int]:
    return sorted(range(1, p.ndim), key=p.stride, reverse=True)


def _adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig, factor: float = 1.0) -> torch.optim.Optimizer:
    """AdamW, whose learning rate is to be `factor` times the run's."""
    options = {"lr": config.learning_rate * factor, "betas": tuple(config.betas), "eps": config.epsilon}
    groups = [{**group, "factor": factor} for group in _groups(parameters, config)]
    return torch.optim.AdamW(groups, **options, fused=True)


def _groups(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> list[dict]:
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
