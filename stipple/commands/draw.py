"""What all drawing commands share: their flags, and the way from a command line to numbered PNG files.

A command is a `Command`: its docstring and what it has besides. See `flags` for the flags, `stipple.commands.drawing_request` for what
is asked for, `stipple.commands.open_model` for the model, `stipple.commands.output` for what is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stipple.commands.drawing_request import Request, read_jobs
from stipple.commands.flags import GIVEN, MODEL, PICTURE, RUN
from stipple.commands.open_model import Opening, open_for_drawing
from stipple.commands.output import Output, columns, make, signs
from stipple_core.config import one_line_errors, short_warnings
from stipple_core.images.drawn_pictures import check_writable
from stipple_core.nearest import did_you_mean

if TYPE_CHECKING:  # torch takes seconds to import: what makes pictures imports it, so that --help answers at once
    from ldm.pipeline import TextToImage

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
COUNTS = ("num_images", "batch_size", "preview_every")  # at least 1


@dataclass(frozen=True, kw_only=True)
class Command:
    """What one command has besides what all share."""

    about: str  # its docstring, which --help shows
    example: str  # how it is called, for those who leave something out
    files: tuple[str, ...] = ()  # fields of Settings that its first words are
    prompt: str | None = None  # where there is none; None: there has to be one
    spellings: tuple[str, ...] = ()  # other names of --prompt
    check: Callable[[TextToImage], None] = lambda model: None  # raises ValueError for a model that can't do it


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        flag = unknown.split(" ")[0].split("=")[0]
        nearest = did_you_mean(flag, self._option_string_actions, cutoff=0.75)
        raise ValueError(f"{message}; did you mean {nearest}?" if nearest else message)


def parser(command: Command) -> Parser:
    """The command line; a flag that is left out is None, which leaves the choice to the model."""
    p = Parser(description=command.about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    words = " ".join([*(name.upper() for name in command.files), "PROMPT"])
    p.add_argument("words", nargs="*", metavar=words, help="what is given, and what to show; one prompt or several")
    for title, flags in (("picture", PICTURE), ("given", GIVEN), ("model", MODEL), ("run", RUN)):
        group = p.add_argument_group(title)
        for name, (others, options) in flags.items():
            others = (*others, *command.spellings) if name == "prompt" else others
            group.add_argument(f"--{name.replace('_', '-')}", *others, dest=name, **options)
    return p


def read_arguments(command: Command, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; flags may be spelled with underscores, and `--` ends them."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags = [_dashes(word) if word.startswith("--") else word for word in argv[:end]]
    arguments = parser(command).parse_intermixed_args(flags)  # flags may stand between words
    arguments.words += argv[end + 1 :]
    for name in COUNTS:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    return arguments


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def read_request(command: Command, arguments: argparse.Namespace) -> Request:
    """What the command line asks for; a flag that may be repeated is a setting of several lines.

    Raises:
        ValueError: a file is missing that the command needs.
    """
    values = {name: getattr(arguments, name) for name in (*GIVEN, *PICTURE, "num_images")}
    words = list(arguments.words)
    for name in command.files:
        if values[name] is None and words and arguments.like is None:  # which has files of its own
            values[name] = words.pop(0)
        if values[name] is None and arguments.like is None and arguments.from_file is None:
            raise ValueError(f"there is no {name}; give one, as in: {command.example}")
    return Request(
        prompts=[*words, *arguments.prompt],
        settings={k: "\n".join(v) if isinstance(v, list) else v for k, v in values.items() if v is not None},
        default=command.prompt,
        example=command.example,
        from_file=arguments.from_file,
        like=arguments.like,
        seed=arguments.seed,
    )


def check_given(command: Command, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a job without a file that the command is about, wherever it was to come from."""
    for name in command.files:
        if not all(job.get(name) for job in jobs):
            raise ValueError(f"there is no {name} for a prompt; give --{name}, or a line with it, or {command.example}")


def check_used(opening: Opening, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for what is to be opened and is of no use to any job, being said only in part."""
    if opening.guidance_model and all(job.get("guidance_method") != "autoguidance" for job in jobs):
        raise ValueError("--guidance-model is for --guidance-method autoguidance; give both, or none")
    for name, scale, usual in (("classifier", "classifier_scale", 3), ("clip_guidance", "clip_scale", 1)):
        if getattr(opening, name) and not any(job.get(scale) for job in jobs):
            flags = f"--{_dashes(name)} leads as much as --{_dashes(scale)} says"
            raise ValueError(f"{flags}, and it says nothing; give both, such as {usual}, or none")
    if opening.prior and all(job.get("image") for job in jobs):
        raise ValueError("--prior makes embeddings of prompts, and the image takes their place; give one of them")


def run(command: Command, argv: Sequence[str]) -> None:
    """Check all that can be checked, open the model, make the pictures."""
    with one_line_errors():
        arguments = read_arguments(command, argv)
        if "help" in (arguments.sampler, arguments.guidance_method, arguments.spacing):
            return list_choices(arguments)
        request = read_request(command, arguments)
        jobs, record = read_jobs(request)
        if request.prompts or request.from_file:  # else a picture is made again, by whichever command
            check_given(command, jobs)
        opening = Opening(**{name: getattr(arguments, name) for name in MODEL})
        check_used(opening, jobs)
        check_writable(Path(arguments.outdir))
        model, about = open_for_drawing(opening, record, arguments.like)
        command.check(model)
        pictures = [picture for job in jobs for picture in model.plan(**job)]
        about |= signs(pictures, record, arguments.like)
        if record and arguments.batch_size is None and arguments.num_images is None:
            batches = [[picture] * picture.batch for picture in pictures]  # see TextToImage.finish
        else:
            batches = list(model.batches(pictures, arguments.batch_size or model.default_batch))
    output = Output(Path(arguments.outdir), None if arguments.no_metadata else about)
    asked = arguments.grid or len(record.get("pictures", ())) > 1  # who likes a grid gets a grid
    made = [picture for picture in make(model, batches, output, arguments.preview_every) if asked]
    if made:
        from stipple_core.images.images import grid

        images = [picture.image for picture in made]
        with one_line_errors():
            print(output.write(grid(images, columns(images)), [p.settings for p in made], "grid-", 4))


def list_choices(arguments: argparse.Namespace) -> None:
    """Print a line for each sampler, guidance method or spacing, whichever `help` was asked for."""
    from ldm.guidance.registry import GUIDANCES
    from ldm.samplers.registry import SAMPLERS
    from ldm.samplers.spacing import SPACINGS

    asked = {"sampler": SAMPLERS, "guidance_method": GUIDANCES, "spacing": SPACINGS}
    for name, choices in asked.items():
        if getattr(arguments, name) == "help":
            for choice, what in choices.items():
                does = what.summary if name != "spacing" else (what.__doc__ or "").splitlines()[0]
                print(f"{choice:21}{does}")


def draw(command: Command, argv: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 after a user's mistake, with 130 after Ctrl-C."""
    try:
        with short_warnings():
            run(command, sys.argv[1:] if argv is None else argv)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        mend = "use a smaller --height and --width, or --batch-size, or a --window"
        print(f"error: there is not enough memory; {mend}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; finished pictures are kept", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
