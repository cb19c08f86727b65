"""The processes that accelerate would start, and their environment, from its config files and the devices it finds."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import str_to_bool
from accelerate.utils.launch import prepare_multi_gpu_env
from yaml import YAMLError

from stipple_core.resources import find_recipe

USE_CPU = "ACCELERATE_USE_CPU"
UNSUPPORTED = {"use_deepspeed": "DeepSpeed", "use_megatron_lm": "Megatron-LM", "tpu": "TPUs"}


@dataclass(frozen=True, kw_only=True)
class AccelerateSettings:
    """How many processes run on this machine, and the environment variables that all of them have."""

    processes: int  # on this machine
    machines: int = 1
    machine_rank: int = 0
    address: str = "127.0.0.1"  # of the machine with rank 0
    port: int
    environment: dict[str, str]

    @classmethod
    def read(
        cls, config_file: str | None = None, processes: int | None = None, **machine: int | str | None
    ) -> AccelerateSettings:
        """Read a config file of accelerate, by default the one that `accelerate config` wrote, if there is one.

        Args:
            config_file: a path, or the name of a file of configs/accelerate.
            processes: over all machines; None: as in the file, else one for each GPU, else 1.
            machine: machine_rank and main_process_ip, where they differ from the file.

        Raises:
            FileNotFoundError, ValueError: for a missing or unreadable file, or more processes than GPUs.
        """
        if processes is not None and processes < 1:
            raise ValueError(f"--processes {processes} must be at least 1")
        arguments = _read_arguments(config_file, {"num_processes": processes, **machine})
        gpus = _gpus(arguments)
        machines, total = arguments.num_machines or 1, max(arguments.num_processes or 1, 1)
        if total % machines:
            raise ValueError(
                f"{total} processes cannot be divided over {machines} machines; use a multiple of {machines}"
            )
        if gpus and total // machines > gpus:
            raise ValueError(
                f"{total // machines} processes need as many GPUs, and there are {gpus}; use --processes {gpus}"
            )
        arguments.main_process_port = arguments.main_process_port if machines > 1 else 0  # 0: any free one
        environment = {k: v for k, v in prepare_multi_gpu_env(arguments).items() if os.environ.get(k) != v}
        if total == 1:  # a process alone uses all cores, and has the whole model
            environment = {k: v for k, v in environment.items() if k not in ("OMP_NUM_THREADS", "ACCELERATE_USE_FSDP")}
        if not gpus and (total > 1 or arguments.use_cpu or arguments.cpu):
            environment[USE_CPU] = "true"
        return cls(
            processes=total // machines,
            machines=machines,
            machine_rank=int(arguments.machine_rank or 0),
            address=(arguments.main_process_ip if machines > 1 else None) or "127.0.0.1",
            port=int(arguments.main_process_port),
            environment=environment,
        )

    def environments(self) -> list[dict[str, str]]:
        """Return the environment of each process on this machine, as torch.distributed reads it."""
        shared = os.environ | self.environment | {
            "WORLD_SIZE": str(self.processes * self.machines), "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip
        first = self.machine_rank * self.processes
        return [shared | {"RANK": str(first + i), "LOCAL_RANK": str(i)} for i in range(self.processes)]


def _read_arguments(config_file: str | None, options: dict[str, Any]) -> argparse.Namespace:
    """Return the arguments of `accelerate launch`, completed from the config file and the devices."""
    words = [] if config_file is None else ["--config_file", find_recipe(config_file, ["accelerate"])]
    words += [f"--{name}={value}" for name, value in options.items() if value is not None]
    arguments = accelerate_launch.launch_command_parser().parse_args([*words, "stipple"])
    logging.getLogger(accelerate_launch.__name__).setLevel(logging.ERROR)  # it names every default that it takes
    try:
        arguments, _, _ = accelerate_launch._validate_launch_command(arguments)
    except (YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"config file {config_file} is not one of accelerate: {' '.join(str(error).split())}"
        ) from None
    for name, what in UNSUPPORTED.items():
        if getattr(arguments, name):
            raise ValueError(f"config file {config_file} is for {what}, which Stipple does not support")
    return arguments


def _gpus(arguments: argparse.Namespace) -> int:
    """Return how many GPUs the processes can use; 0 where they run on the CPU."""
    if str_to_bool(os.environ.get(USE_CPU, "false")) or arguments.use_cpu or arguments.cpu:
        return 0
    ids = arguments.gpu_ids
    return torch.cuda.device_count() if ids in (None, "all") else len(str(ids).split(","))
