"""Muon: the momentum of a matrix is orthogonalized before it moves the matrix (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.sharding import held_rows, local, whole

# a, b, c of the quintic iteration X <- a X + (b G + c G^2) X with G = X X^T, of Jordan et al. 2024: the slope at 0 is
# as large as it can be, and singular values end between 0.7 and 1.2 instead of at 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7  # gradients below are divided by this instead of by their norm


class Muon(torch.optim.Optimizer):
    """Muon for matrices [O, N], with Nesterov momentum and decoupled weight decay.

    The update is scaled to the root mean square that AdamW's usually has, 0.2 times the learning rate, so that both can
    share a learning rate (Liu et al. 2025, arXiv:2502.16982, eq. 4). Names and shapes of the state are those of
    `torch.optim.Muon`, which always orthogonalizes in bfloat16; here it is done in float32 where the device has no fast
    bfloat16, as most CPUs.

    Args:
        parameters: of two dimensions. Sharded ones (DTensor) are gathered to be orthogonalized, on every process alike.
        lr: the learning rate.
        weight_decay: times the learning rate, the share of a weight that is taken away in each step.
        momentum: of the gradients' running mean.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient."""
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
    """The matrix [O, N] with its singular values moved to about 1, in the precision that suits its device.

    In float32 a matrix at least twice as wide as high is done in Gram form (`_by_gram`), which needs two products with
    the long side instead of two in each iteration: the same up to rounding.
    """
    dtype = torch.bfloat16 if _has_bfloat16(matrix.device) else torch.promote_types(matrix.dtype, torch.float32)
    x = matrix.to(dtype)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=SMALLEST_NORM)  # no singular value is above 1 now
    wide = x.shape[1] >= 2 * x.shape[0] and dtype != torch.bfloat16
    x = _by_gram(x, iterations) if wide else _plain(x, iterations)
    return x.T if tall else x


def _plain(x: Tensor, iterations: int) -> Tensor:
    """The iteration as it is written, x [O, N]."""
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.T  # [O, O]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor, iterations: int) -> Tensor:
    """The iteration on G = X X^T [O, O] alone: with P = a I + b G + c G^2, G becomes P G P; the result is (... P P) X.

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
    """The orthogonalized update; of a sharded one, the rows that this process holds."""
    if not isinstance(update, DTensor):
        return orthogonalize(update)
    first, last = held_rows(update)
    return orthogonalize(whole(update))[first:last]


def _has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast: most CPUs only emulate them."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
