"""The networks that a run trains: compiled, and replicated (DDP) or partitioned (FSDP2) over several processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from stipple.training.distributed import fsdp
from stipple.training.distributed.partial_weights import saved_part


class WrappedNetworks:
    """Wraps models as they are registered.

    Args:
        accelerator: provides processes, device and precision.
        compiled: whether to torch.compile the models.
        partitions: whether to partition the models that allow it over the processes.
    """

    def __init__(self, accelerator: Accelerator, compiled: bool, partitions: bool):
        self.accelerator, self.compiled = accelerator, compiled
        self.partitions = partitions and accelerator.num_processes > 1
        self._wrapped: list[nn.Module] = []
        self._blanks: dict[nn.Module, nn.Module] = {}  # partitioned model -> its `fsdp.blank`

    @property
    def partitioned(self) -> bool:
        """Whether any network is partitioned; then all processes take part in saving and in making whole copies."""
        return bool(self._blanks)

    def add(self, model: nn.Module, may_partition: bool) -> tuple[nn.Module, Any]:
        """Move a model to the device; returns the wrapped model, and the part of it that is saved and restored."""
        network, part = self._partitioned(model) if self.partitions and may_partition else self._replicated(model)
        self._wrapped.append(network)
        return network, part

    def whole(self, model: nn.Module, device: torch.device | str, wanted: bool) -> nn.Module | None:
        """The model itself, or a whole copy of a partitioned one, on processes with `wanted`; all have to call it."""
        return fsdp.gathered(model, self._blanks[model], device, wanted) if model in self._blanks else model

    def synchronise(self, on: bool) -> None:
        """Set whether the next backward passes average gradients over the processes."""
        for network in self._wrapped:
            if isinstance(network, FSDPModule):
                network.set_requires_gradient_sync(on)
            if isinstance(network, nn.parallel.DistributedDataParallel):
                network.require_backward_grad_sync = on  # what DDP.no_sync() sets, for a loop that is not a with-block

    def buffers(self) -> Iterator[torch.Tensor]:
        """The buffers of all networks."""
        return (buffer for network in self._wrapped for buffer in network.buffers())

    def _replicated(self, model: nn.Module) -> tuple[nn.Module, Any]:
        model.to(self.accelerator.device)
        if self.compiled:
            model.compile()
        with warnings.catch_warnings():  # torch deprecates the option that keeps DDP from broadcasting buffers
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = self.accelerator.prepare_model(model)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # channels_last
        return wrapped, saved_part(model)

    def _partitioned(self, model: nn.Module) -> tuple[nn.Module, fsdp.FsdpWeights]:
        self._blanks[model] = fsdp.blank(model)
        if self.compiled:
            model.compile()
        network = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # for autocast
        precision = self.accelerator.mixed_precision if self.accelerator.native_amp else "no"  # as autocast computes
        fsdp.partition(network, self.accelerator.device, precision)
        return network, fsdp.FsdpWeights(network)
