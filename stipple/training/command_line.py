"""The arguments that every training script takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RESUME = {"auto": "true", "never": "false"}  # what trainer.resume is then


def parse(parser: Any, example: str, argv: Sequence[str] | None) -> Any:
    """Let an ArgumentParser, made by the script, read --config and overrides; flags become overrides, too.

    Returns a namespace with `config`, a path or None, and `overrides`, a list of key=value.
    """
    parser.add_argument("--config", help=f"a YAML file such as {example}")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks (trainer.compile=true)")
    told = (
        "auto, the default: go on from the newest valid checkpoint of the run folder, if any; never: begin anew in it"
    )
    parser.add_argument("--resume", choices=RESUME, help=told)
    parser.add_argument("--no-resume", action="store_const", const="never", dest="resume", help="as --resume never")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as trainer.steps=1000 data.folder=PATH")
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides += ["trainer.compile=true"] * arguments.compile
    arguments.overrides += [f"trainer.resume={RESUME[arguments.resume]}"] if arguments.resume else []
    return arguments
