"""Networks whose weights, gradients, averages and moments are partitioned over the processes: FSDP2 of torch.

Zhao et al. 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`. Each parameter is a DTensor of which every
process holds some rows, and each process saves its rows. Validation, samples and saved models use a whole copy.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from stipple_core.files.training_state import Rows, Saved

SMALLEST_BLOCK = 1 / 200  # of a model's weights; smaller blocks are gathered together with the rest of the model
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precision -> dtype of gathered weights

T = TypeVar("T", bound=Tensor)


def requested() -> bool:
    """Whether `accelerate launch` requests FSDP; hides the request from accelerate, which would wrap models itself.

    Raises:
        ValueError: the settings of FSDP are not supported.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("fsdp_config.fsdp_version must be 2, see configs/accelerate/fsdp.yaml")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError(
            "fsdp_config.fsdp_offload_params is not supported; leave it out, and use ema.device=cpu to save memory"
        )
    return True


def partition(model: nn.Module, device: torch.device, precision: str) -> None:
    """Partition the weights of a model over the processes, starting from those of the first process.

    Under half precision the model computes in autocast, as without FSDP, with weights that are gathered in half
    precision. Stored weights, and sums of gradients over processes, are float32.
    """
    for p in model.parameters():
        p.data = p.data.to(device).contiguous()  # FSDP2 does not support channels_last and other memory orders
        broadcast(p.data, 0)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    half = HALVES.get(precision)
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered as one: the outermost callable members of module lists that are not small."""
    least = SMALLEST_BLOCK * _count(model)
    return [block for block in _callable_members(model) if _count(block) >= least]


def blank(model: nn.Module) -> nn.Module:
    """Copy a model without memory for its parameters, which are on "meta"; buffers are copied."""
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, parameters)


def gathered(model: nn.Module, like: nn.Module, device: torch.device | str, wanted: bool) -> nn.Module | None:
    """A whole copy of a partitioned model on the processes that want it; every process has to call it.

    Args:
        model: partitioned.
        like: its `blank`, made before it was partitioned.
        device: of the copy. Weights are gathered one at a time, and moved there at once.
        wanted: whether this process gets the copy; otherwise it only sends its rows, and gets None.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        value = whole(tensor.detach())
        if wanted:
            weights[name] = value.to(device, copy=True)
    if not wanted:
        return None
    copied = blank(like)
    copied.load_state_dict(weights, assign=True)
    return copied


class FsdpWeights:
    """The weights of a partitioned model, as a part of the state of a run."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Partitioned parameters, and buffers."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor | Saved]) -> None:
        """Read the rows of this process. Raises ValueError if names or shapes are not those of the model."""
        own = self.model.state_dict()
        if own.keys() != state.keys():
            raise ValueError(f"its weights differ: {', '.join(sorted(own.keys() ^ state.keys())[:5])}")
        for name, tensor in own.items():
            fill(tensor.detach(), state[name])


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds, sharing memory; all rows unless it is partitioned."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor; every process has to call it if the tensor is partitioned."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: T, source: Tensor | Saved, like: Tensor | None = None) -> T:
    """Copy a whole tensor, in memory or on disk, into one that may be partitioned; only its own rows are read.

    Args:
        tensor: filled and returned.
        source: all rows.
        like: partitioned as `tensor`, which may then be just the rows of this process; None: `tensor` itself.

    Raises:
        ValueError: the shapes differ.
    """
    like = tensor if like is None else like
    if source.shape != like.shape:
        raise ValueError(f"a shape of {list(source.shape)} where {list(like.shape)} is expected")
    local(tensor).copy_(source[slice(*held_rows(like))] if isinstance(like, DTensor) else source[...])
    return tensor


def rows(tensor: Tensor, like: Tensor) -> Tensor | Rows:
    """The rows that this process saves of a tensor that is partitioned as `like`; the tensor itself if it is not."""
    return Rows(local(tensor), held_rows(like)[0], like.shape) if isinstance(like, DTensor) else tensor


def rows_of_all(node: Any) -> Any:
    """Replace the partitioned tensors in nested dicts and lists by their `rows`, for `save_state`."""
    if isinstance(node, dict):
        return {key: rows_of_all(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [rows_of_all(value) for value in node]
    return rows(node, node) if isinstance(node, DTensor) else node


def held_rows(tensor: DTensor) -> tuple[int, int]:
    """The first row of a partitioned tensor that this process holds, and the one after its last."""
    assert tensor.placements == (Shard(0),), "networks are partitioned by rows, over all processes"
    count, rank = tensor.shape[0], tensor.device_mesh.get_local_rank()
    each = -(-count // tensor.device_mesh.size())  # as torch.chunk
    return min(rank * each, count), min((rank + 1) * each, count)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _callable_members(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """The outermost modules that are in a module list and have a forward; modules without one are searched."""
    if listed and type(module).forward is not nn.Module.forward:
        yield module
        return
    for child in module.children():
        yield from _callable_members(child, listed or isinstance(module, nn.ModuleList))
