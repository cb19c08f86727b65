"""Muon: the update of a matrix is its orthogonalized momentum (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stipple.training.distributed.fsdp import held_rows, local, whole

# a, b, c of the quintic iteration X <- a X + (b G + c G^2) X with G = X X^T (Jordan et al. 2024). The slope at 0 is as
# large as possible; singular values converge to between 0.7 and 1.2 instead of to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7  # gradients with a smaller norm are divided by this instead


class Muon(torch.optim.Optimizer):
    """Muon for matrices [O, N], with Nesterov momentum and decoupled weight decay.

    Updates are scaled to the usual root mean square of AdamW's, 0.2 times the learning rate, so that both can share a
    learning rate (Liu et al. 2025, arXiv:2502.16982, eq. 4). The state has the names and shapes of that of
    `torch.optim.Muon`, which always orthogonalizes in bfloat16. This class uses float32 on devices without fast
    bfloat16, such as most CPUs.

    Args:
        parameters: of two dimensions. Partitioned ones (DTensor) are gathered and orthogonalized on every process.
        lr: the learning rate.
        weight_decay: a step multiplies weights by 1 - lr * weight_decay.
        momentum: of the running mean of gradients.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, momentum = self.state[p], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(mean, momentum)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * math.sqrt(max(p.shape))  # an orthogonal [O, N] has a root mean square of max(O, N)^-1/2
                local(p).add_(_orthogonal_rows(update).to(p.dtype), alpha=-group["lr"] * size)


def orthogonalize(matrix: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Return a matrix [O, N] with the same singular vectors and singular values of about 1.

    It is computed in bfloat16 if the device has fast products in bfloat16, otherwise in float32. In float32, a matrix
    whose long side is at least twice its short side uses the Gram form (`_by_gram`), with two products of the long side
    in all instead of two in each iteration. The result is the same up to rounding.
    """
    dtype = torch.bfloat16 if _has_bfloat16(matrix.device) else torch.promote_types(matrix.dtype, torch.float32)
    x = matrix.to(dtype)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=SMALLEST_NORM)  # all singular values are at most 1
    wide = x.shape[1] >= 2 * x.shape[0] and dtype != torch.bfloat16
    x = _by_gram(x, iterations) if wide else _plain(x, iterations)
    return x.T if tall else x


def _plain(x: Tensor, iterations: int) -> Tensor:
    """The iteration on x [O, N]."""
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.T  # [O, O]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor, iterations: int) -> Tensor:
    """The iteration on G = X X^T [O, O]. With P = a I + b G + c G^2, a step is G <- P G P, and the result (... P P) X.

    All P are polynomials of the first G, so they are symmetric and commute.
    """
    a, b, c = COEFFICIENTS
    gram, product = x @ x.T, None  # [O, O]
    for iteration in range(iterations):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if iteration < iterations - 1:
            gram = factor @ gram @ factor
    return x if product is None else product @ x


def _orthogonal_rows(update: Tensor) -> Tensor:
    """The orthogonalized update; if it is partitioned, only the rows of this process."""
    if not isinstance(update, DTensor):
        return orthogonalize(update)
    first, last = held_rows(update)
    return orthogonalize(whole(update))[first:last]


def _has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast; most CPUs emulate them."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
