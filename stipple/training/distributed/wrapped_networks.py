"""The networks that a run trains: compiled, wrapped for several processes (DDP) or spread over them (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stipple.training.distributed import fsdp
from stipple.training.distributed.partial import saved_part


class WrappedNetworks:
    """Wraps models as they are registered.

    Args:
        accelerator: knows processes, device and precision.
        compiled: torch.compile them.
        shards: spread those over the processes that allow it.
    """

    def __init__(self, accelerator: Accelerator, compiled: bool, shards: bool):
        self.accelerator, self.compiled = accelerator, compiled
        self.shards = shards and accelerator.num_processes > 1
        self._wrapped: list[nn.Module] = []
        self._blanks: dict[nn.Module, nn.Module] = {}  # of the sharded models

    @property
    def sharded(self) -> bool:
        """Whether any is: then every process has rows to save, and a whole copy is a matter for all."""
        return bool(self._blanks)

    def add(self, model: nn.Module, may_partition: bool) -> tuple[nn.Module, Any]:
        """Move a model to the device; returns it wrapped, and what is saved and restored of it."""
        network, part = self._sharded(model) if self.shards and may_partition else self._synchronised(model)
        self._wrapped.append(network)
        return network, part

    def whole(self, model: nn.Module, place: torch.device | str, wanted: bool) -> nn.Module | None:
        """The model itself, or where it is sharded a copy at `place`, for processes that want it; all call it."""
        return fsdp.gathered(model, self._blanks[model], place, wanted) if model in self._blanks else model

    def synchronise(self, on: bool) -> None:
        """Whether the next backward passes average gradients over the processes."""
        for network in self._wrapped:
            if isinstance(network, FSDPModule):
                network.set_requires_gradient_sync(on)
            if isinstance(network, nn.parallel.DistributedDataParallel):
                network.require_backward_grad_sync = on  # what DDP.no_sync() sets, for a loop that is not a with-block

    def buffers(self) -> Iterator[torch.Tensor]:
        """What networks keep beside their parameters."""
        return (buffer for network in self._wrapped for buffer in network.buffers())

    def _synchronised(self, model: nn.Module) -> tuple[nn.Module, Any]:
        model.to(self.accelerator.device)
        if self.compiled:
            model.compile()
        with warnings.catch_warnings():  # torch deprecates the option that keeps DDP from broadcasting buffers
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = self.accelerator.prepare_model(model)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # channels_last
        return wrapped, saved_part(model)

    def _sharded(self, model: nn.Module) -> tuple[nn.Module, fsdp.FsdpWeights]:
        self._blanks[model] = fsdp.blank(model)
        if self.compiled:
            model.compile()
        network = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # for autocast
        precision = self.accelerator.mixed_precision if self.accelerator.native_amp else "no"  # no autocast: no halves
        fsdp.shard(network, self.accelerator.device, precision)
        return network, fsdp.FsdpWeights(network)
