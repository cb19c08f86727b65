"""Start training through accelerate: in this process on one device, in a process for each of several devices."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from stipple.cli.process_group import run_processes, stop_with_launcher
from stipple.cli.training_arguments import TRAINING, read_arguments
from stipple_core.config import one_line_errors

LAUNCH_FLAGS = ("--processes", *(f"--{name}" for name in ("config_file", "machine_rank", "main_process_ip")))


def launch(name: str, argv: Sequence[str] | None = None) -> None:
    """Run a training command on all devices that accelerate finds.

    The config is read, and mistakes in it are reported, before any process is started.
    """
    arguments = read_arguments(name, argv, launches=True)
    module = importlib.import_module(TRAINING[name].module)
    if "LOCAL_RANK" in os.environ:  # started by `launch_processes`, by accelerate or by torchrun
        stop_with_launcher()
        return run_here(module, arguments)
    config = module.read_config(arguments)
    with one_line_errors():
        from stipple.cli.accelerate_settings import AccelerateSettings

        machine = {name: getattr(arguments, name) for name in ("machine_rank", "main_process_ip")}
        settings = AccelerateSettings.read(arguments.config_file, arguments.processes, **machine)
    if settings.processes == 1:
        os.environ.update(settings.environment)
        return module.run(config, arguments)
    arguments.init = None  # each process opens the model of init_from itself
    command = [*python(), "-m", "stipple", name, *without_launch_flags(arguments.argv)]
    code = run_processes(command, settings.environments())
    if code:
        raise SystemExit(code)


def run_here(module: ModuleType, arguments: argparse.Namespace) -> None:
    """Run a training command in this process."""
    module.run(module.read_config(arguments), arguments)


def python() -> list[str]:
    """Return the command that starts Python with the current folder on its path only where this process has it."""
    return [sys.executable] if {"", os.getcwd()} & set(sys.path) else [sys.executable, "-P"]


def without_launch_flags(argv: Sequence[str]) -> list[str]:
    """Remove LAUNCH_FLAGS, with their values, from a command line that was parsed before."""
    words, rest = iter(argv), []
    for word in words:
        flag, equals, _ = word.partition("=")
        if not word.startswith("--") or f"--{flag[2:].replace('-', '_')}" not in LAUNCH_FLAGS:
            rest.append(word)
        elif not equals:
            next(words)  # its value
    return rest
