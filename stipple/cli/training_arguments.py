"""The command lines of the commands that train: --config, overrides, and how many processes to start.

This module imports nothing heavy, so that --help and mistakes in flags answer at once.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stipple.cli.argument_parser import Parser
from stipple_core.config import one_line_errors
from stipple_core.resources import find_recipe

RESUME = {"auto": "true", "never": "false"}  # values of --resume -> trainer.resume


@dataclass(frozen=True, kw_only=True)
class TrainingCommand:
    """A command that trains or, like `cache`, runs on several devices.

    Its module defines `read_config(arguments)`, which returns the config, and `run(config, arguments)`.
    """

    module: str
    recipes: tuple[str, ...]  # folders of configs/ with its recipes
    example: str  # one of them
    resumes: bool = True  # whether it has --resume and --compile


TRAINING = {
    "train-autoencoder": TrainingCommand(
        module="stipple.commands.train_autoencoder", recipes=("autoencoder",), example="emoji"
    ),
    "cache": TrainingCommand(
        module="stipple.commands.cache", recipes=("ldm", "finetune"), example="emoji", resumes=False
    ),
    "train": TrainingCommand(module="stipple.commands.train", recipes=("ldm", "finetune"), example="emoji"),
    "train-classifier": TrainingCommand(
        module="stipple.commands.train_classifier", recipes=("classifier",), example="pixels-small"
    ),
}


def training_parser(name: str, launches: bool = False) -> Parser:
    """Return the parser of a training command; with `launches` it has the flags that start processes."""
    command = TRAINING[name]
    parser = Parser(name, "[--config FILE] [key=value ...] [flags]", module_docstring(command.module))
    first, keys = parser.first, "train" if name == "cache" else name
    first.add_argument(
        "--config", metavar="FILE", help=f"a YAML file, or the name of a recipe, such as {command.example}"
    )
    first.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"config keys; `stipple config {keys}` lists them"
    )
    if command.resumes:
        first.add_argument(
            "--resume", choices=RESUME,
            help="auto (default): continue from the newest valid checkpoint of the run; never: start over",
        )  # fmt: skip
        first.add_argument(
            "--no-resume", action="store_const", const="never", dest="resume", help="same as --resume never"
        )
        first.add_argument("--compile", action="store_true", help="torch.compile the networks (trainer.compile=true)")
    parser.add_help_flag(first)
    if launches:
        group = parser.add_argument_group("processes")
        group.add_argument(
            "--processes", type=int, metavar="N", help="processes to start (default: one for each GPU; without GPUs, 1)"
        )
        group.add_argument(
            "--config_file", "--config-file", metavar="FILE",
            help="a config file of accelerate, or one of configs/accelerate, such as fsdp",
        )  # fmt: skip
        group.add_argument(
            "--machine_rank", "--machine-rank", type=int, metavar="N", help="several machines: the rank of this one"
        )
        group.add_argument(
            "--main_process_ip", "--main-process-ip", metavar="ADDRESS", help="several machines: that of rank 0"
        )
    return parser


def read_arguments(name: str, argv: Sequence[str] | None = None, launches: bool = False) -> argparse.Namespace:
    """Parse the command line of a training command; exits with one line and code 2 after a mistake.

    Returns:
        A namespace with `config`, a path or None; `overrides`, a list of key=value; and `argv`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = TRAINING[name]
    with one_line_errors():
        arguments = training_parser(name, launches).parse_intermixed_args(argv)
        if arguments.config is not None:
            arguments.config = find_recipe(arguments.config, command.recipes)
    arguments.argv = argv
    if command.resumes:
        arguments.overrides += ["trainer.compile=true"] * arguments.compile
        arguments.overrides += [f"trainer.resume={RESUME[arguments.resume]}"] if arguments.resume else []
    return arguments


def module_docstring(module: str) -> str | None:
    """Return the docstring of a module without importing it: modules that train import torch, which takes seconds."""
    spec = importlib.util.find_spec(module)
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
