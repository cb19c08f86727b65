"""The command `stipple`, and `python -m stipple`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from stipple.cli.exit_codes import INTERRUPTED, USAGE_ERROR

DRAWING = {
    "draw": "draw pictures from prompts",
    "img2img": "change a picture as a prompt describes",
    "inpaint": "repaint a part of a picture",
    "upscale": "enlarge a picture",
    "sample": "draw with a model of classes, layouts or maps, or without any input",
}
TRAINING = {
    "train-autoencoder": "stage 1: train an autoencoder on a folder of images",
    "cache": "encode images and captions once, so that training is faster",
    "train": "stage 2: train or fine-tune a diffusion model",
    "train-classifier": "train a classifier that guides sampling",
}
OTHERS = {
    "convert": "convert between single files and model folders",
    "embed": "compute CLIP embeddings of a folder of images",
    "config": "list the config keys of a training command",
    "signal": "ask a running training to save or to stop",
}
MODULES = {"config": "config_keys", "signal": "signal_run"}  # where the module is not named like the command
START = (
    ('stipple draw "a red heart, fluent 3d style"', "draw with the model that comes with Stipple"),
    ("stipple draw --sampler help", "list the samplers, and when to use which"),
    ("stipple train-autoencoder --config emoji data.folder=FOLDER", "train on your own images: stage 1"),
    ("stipple train --config emoji data.folder=FOLDER autoencoder=MODEL", "train on your own images: stage 2"),
    ("stipple config train", "list everything that can be configured"),
)


def help_text() -> str:
    """Return what `stipple --help` prints."""
    lines = ["usage: stipple COMMAND ...", "", "Text-to-image models that you train yourself. Start with:", ""]
    for command, purpose in START:
        lines += [f"  {command}", f"      {purpose}"]
    for title, commands in (("draw", DRAWING), ("train", TRAINING), ("models and runs", OTHERS)):
        lines += ["", f"{title}:", *(f"  {name:18} {purpose}" for name, purpose in commands.items())]
    return "\n".join(
        [*lines, "", "`stipple COMMAND --help` describes a command; `stipple --version` prints the version."]
    )


def version() -> str:
    """Return the version of the installed package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("stipple")
    except PackageNotFoundError:
        return "unknown (not installed)"


def run(argv: Sequence[str]) -> None:
    """Run the command that the first word names."""
    commands = DRAWING | TRAINING | OTHERS
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print(help_text())
    elif argv[0] == "--version":
        _print(f"stipple {version()}")
    elif argv[0] not in commands:
        from stipple_core.nearest import did_you_mean

        nearest = did_you_mean(argv[0], commands, cutoff=0.5)
        hint = f"did you mean {nearest}?" if nearest else f"the commands are {', '.join(commands)}"
        print(f"error: command {argv[0]!r} is unknown; {hint}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)
    elif argv[0] in TRAINING:
        from stipple.cli.launch import launch

        launch(argv[0], argv[1:])
    else:
        module = MODULES.get(argv[0], argv[0])
        importlib.import_module(f"stipple.commands.{module}").main(argv[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after a user's mistake and with 130 after Ctrl-C."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (closed by the caller, as by `>&-`)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        run(sys.argv[1:] if argv is None else argv)
        _print()
    except BrokenPipeError:  # who reads the output has seen enough, as in `stipple config train | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _print(*lines: str) -> None:
    """Print lines and flush standard output; a full disk is one line and exit code 1."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
        print(f"error: standard output can't be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
