"""Networks whose weights, gradients, averages and moments are spread over the processes: FSDP2 of torch.

Zhao et al. 2023, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`. Each parameter is a DTensor of which every
process holds some rows. What is saved are these rows; what measures, draws or writes a model gets a whole copy of it.
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

SMALLEST_BLOCK = 1 / 200  # of a model's weights: a block of fewer is gathered together with what stands alone
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # precision -> dtype in which weights are gathered

T = TypeVar("T", bound=Tensor)


def requested() -> bool:
    """Whether `accelerate launch` was told to shard; accelerate itself is kept from it, which would do it its own way.

    Raises:
        ValueError: told to do so in a way that is not implemented here.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("fsdp_config.fsdp_version must be 2, see configs/accelerate/fsdp.yaml")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ValueError(
            "fsdp_config.fsdp_offload_params can't be true; leave it out, ema.device=cpu saves memory, too"
        )
    return True


def shard(model: nn.Module, device: torch.device, precision: str) -> None:
    """Spread the weights of a model, which all processes have alike from now on, over them.

    Under half precision it computes in autocast as an unsharded one does, with weights that are gathered in half
    precision; those that are kept, and sums of gradients over processes, are float32.
    """
    for p in model.parameters():
        p.data = p.data.to(device).contiguous()  # FSDP2 refuses channels_last and other orders of memory
        broadcast(p.data, 0)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    half = HALVES.get(precision)
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the outermost members of lists that can be called, and are not small."""
    least = SMALLEST_BLOCK * _count(model)
    return [block for block in _callable_members(model) if _count(block) >= least]


def blank(model: nn.Module) -> nn.Module:
    """A copy of a model with no memory for its parameters, which are on "meta"; buffers are copied."""
    parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, parameters)


def gathered(model: nn.Module, like: nn.Module, device: torch.device | str, wanted: bool) -> nn.Module | None:
    """A whole, unsharded copy of a sharded model; every process calls it, and gets one where it is wanted.

    Args:
        model: sharded.
        like: its `blank`, made before it was sharded.
        device: of the copy. Weights are gathered one at a time, and go there at once.
        wanted: whether this process is to have it; else it only takes part.
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
    """The weights of a sharded model as a part of a run's state."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, sharded, and buffers."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor | Saved]) -> None:
        """Read the rows that are held here; ValueError when names or shapes are not this model's."""
        own = self.model.state_dict()
        if own.keys() != state.keys():
            raise ValueError(f"its weights differ: {', '.join(sorted(own.keys() ^ state.keys())[:5])}")
        for name, tensor in own.items():
            fill(tensor.detach(), state[name])


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds: all of them where it is not sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, gathered where it is sharded: then every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: T, source: Tensor | Saved, like: Tensor | None = None) -> T:
    """Copy a whole tensor, in memory or on disk, into one that may be sharded: only rows that are held are read.

    Args:
        tensor: filled and returned.
        source: all rows.
        like: sharded as `tensor`, which then may be the bare rows of this process; None: `tensor` itself.

    Raises:
        ValueError: the shapes differ.
    """
    like = tensor if like is None else like
    if source.shape != like.shape:
        raise ValueError(f"a shape of {list(source.shape)} where {list(like.shape)} is expected")
    local(tensor).copy_(source[slice(*held_rows(like))] if isinstance(like, DTensor) else source[...])
    return tensor


def rows(tensor: Tensor, like: Tensor) -> Tensor | Rows:
    """What a process saves of a tensor that is sharded as `like`: its rows of it."""
    return Rows(local(tensor), held_rows(like)[0], like.shape) if isinstance(like, DTensor) else tensor


def rows_of_all(node: Any) -> Any:
    """Nested dicts and lists with `rows` of the sharded tensors in them, for `stipple_core.files.training_state.save_state`."""
    if isinstance(node, dict):
        return {key: rows_of_all(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [rows_of_all(value) for value in node]
    return rows(node, node) if isinstance(node, DTensor) else node


def held_rows(tensor: DTensor) -> tuple[int, int]:
    """The first row of a sharded tensor that this process holds, and that after its last one."""
    assert tensor.placements == (Shard(0),), "networks are sharded by rows, over all processes"
    count, rank = tensor.shape[0], tensor.device_mesh.get_local_rank()
    each = -(-count // tensor.device_mesh.size())  # as torch.chunk
    return min(rank * each, count), min((rank + 1) * each, count)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _callable_members(module: nn.Module, listed: bool = False) -> Iterator[nn.Module]:
    """The outermost modules that are in a list and have a forward; a module without is passed through."""
    if listed and type(module).forward is not nn.Module.forward:
        yield module
        return
    for child in module.children():
        yield from _callable_members(child, listed or isinstance(module, nn.ModuleList))
