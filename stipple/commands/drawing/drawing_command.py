"""What all drawing commands share: from a command line to numbered PNG files.

A command is a `DrawingCommand`. `flags` has the table of flags, `drawing_request` reads prompts and settings,
`open_model` opens the model, and `output` writes the pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple.cli.argument_parser import Parser
from stipple.cli.exit_codes import INTERRUPTED, USAGE_ERROR
from stipple.commands.drawing.choices import asked_for_help, list_choices
from stipple.commands.drawing.drawing_request import DrawingRequest, read_jobs
from stipple.commands.drawing.flags import FIRST, FLAGS, GROUPS, INPUTS, MODEL, PICTURE
from stipple.commands.drawing.open_model import Opening, open_for_drawing
from stipple.commands.drawing.output import Output, columns, draw_batches, input_hashes
from stipple_core.config import one_line_errors, short_warnings
from stipple_core.images.drawn_pictures import check_writable

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    from ldm.pipeline import TextToImage

COUNTS = ("num_images", "batch_size", "preview_every")  # flags that must be at least 1
NOT_EMPTY = ("checkpoint", "outdir", "like", "from_file")  # flags for which "" is a mistake, such as an unset variable


@dataclass(frozen=True, kw_only=True)
class DrawingCommand:
    """What distinguishes one drawing command from the others."""

    name: str
    about: str  # its docstring, which --help shows
    example: str  # a command line, for error messages
    files: tuple[str, ...] = ()  # fields of Settings that its first words set
    first: tuple[str, ...] = ()  # flags that --help shows first, besides FIRST
    prompt: str | None = None  # the default prompt; None: a prompt is required
    spellings: tuple[str, ...] = ()  # other names of --prompt
    check: Callable[[TextToImage], None] = lambda model: None  # raises ValueError for a model of another kind


def make_parser(command: DrawingCommand) -> Parser:
    """Return the parser of a command; a flag that is not specified is None, which leaves the choice to the model."""
    words = " ".join([*(name.upper() for name in command.files), "PROMPT"])
    parser = Parser(command.name, f"[{words} ...] [flags]", command.about)
    about = f"{' and '.join(command.files)}, then any number of prompts" if command.files else "one or more prompts"
    parser.first.add_argument("words", nargs="*", metavar=words, help=about)
    first = tuple(dict.fromkeys((*command.files, *command.first, *FIRST)))
    for name in first:
        _add_flag(parser.first, name, command)
    parser.add_help_flag(parser.first)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in first:
                _add_flag(group, name, command)
    return parser


def _add_flag(group: Any, name: str, command: DrawingCommand) -> None:
    others, options = FLAGS[name]
    others = (*others, *command.spellings) if name == "prompt" else others
    group.add_argument(f"--{name.replace('_', '-')}", *others, dest=name, **options)


def read_arguments(command: DrawingCommand, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; flags may be spelled with underscores, and all words after `--` are prompts."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags = [_with_dashes(word) if word.startswith("--") else word for word in argv[:end]]
    arguments = make_parser(command).parse_intermixed_args(flags)  # words may stand between flags
    arguments.words += argv[end + 1 :]
    for name in NOT_EMPTY:
        if getattr(arguments, name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty; specify a path or name, or leave it out")
    for name in COUNTS:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    return arguments


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def read_request(command: DrawingCommand, arguments: argparse.Namespace) -> DrawingRequest:
    """Return what a command line asks for; the values of a repeated flag are joined as lines.

    Raises:
        ValueError: a file that the command requires is missing.
    """
    values = {name: getattr(arguments, name) for name in (*INPUTS, *PICTURE, "num_images")}
    words = list(arguments.words)
    for name in command.files:
        if values[name] is None and words and arguments.like is None:  # --like already has the files
            values[name] = words.pop(0)
        if values[name] is None and arguments.like is None and arguments.from_file is None:
            raise ValueError(f"there is no {name}; give one, as in: {command.example}")
    return DrawingRequest(
        prompts=[*words, *arguments.prompt],
        settings={k: "\n".join(v) if isinstance(v, list) else v for k, v in values.items() if v is not None},
        default=command.prompt,
        example=command.example,
        from_file=arguments.from_file,
        like=arguments.like,
        seed=arguments.seed,
    )


def check_files(command: DrawingCommand, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a job without a file that the command requires."""
    for name in command.files:
        if not all(job.get(name) for job in jobs):
            raise ValueError(f"there is no {name} for a prompt; give --{name}, or a line with it, or {command.example}")


def check_opening(opening: Opening, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a model to be opened that no job uses, because another flag is missing."""
    if opening.guidance_model and all(job.get("guidance_method") != "autoguidance" for job in jobs):
        raise ValueError("--guidance-model is for --guidance-method autoguidance; give both, or none")
    for name, scale, usual in (("classifier", "classifier_scale", 3), ("clip_guidance", "clip_scale", 1)):
        if getattr(opening, name) and not any(job.get(scale) for job in jobs):
            flag, scale_flag = _with_dashes(f"--{name}"), _with_dashes(f"--{scale}")
            raise ValueError(f"{flag} has no effect without its scale; add {scale_flag} {usual}, or leave out both")
    if opening.prior and all(job.get("image") for job in jobs):
        raise ValueError("--prior makes embeddings from prompts, and the image replaces them; give one of the two")


def run(command: DrawingCommand, argv: Sequence[str]) -> None:
    """Check the command line, open the model, and draw the pictures."""
    with one_line_errors():
        arguments = read_arguments(command, argv)
        choices = [list_choices(name, arguments.checkpoint) for name in asked_for_help(arguments)]
    if choices:
        return print("\n\n".join(choices))
    with one_line_errors():
        request = read_request(command, arguments)
        jobs, record = read_jobs(request)
        if request.prompts or request.from_file:  # otherwise a picture is drawn again, which any command can do
            check_files(command, jobs)
        opening = Opening(**{name: getattr(arguments, name) for name in MODEL})
        check_opening(opening, jobs)
        check_writable(Path(arguments.outdir))
        model, about = open_for_drawing(opening, record, arguments.like)
        command.check(model)
        pictures = [picture for job in jobs for picture in model.plan(**job)]
        about |= input_hashes(pictures, record, arguments.like)
        if record and arguments.batch_size is None and arguments.num_images is None:
            batches = [[picture] * picture.batch for picture in pictures]  # see TextToImage.finish
        else:
            batches = list(model.batches(pictures, arguments.batch_size or model.default_batch))
    output = Output(Path(arguments.outdir), None if arguments.no_metadata else about)
    as_grid = arguments.grid or len(record.get("pictures", ())) > 1  # the record of a grid has several pictures
    drawn = [picture for picture in draw_batches(model, batches, output, arguments.preview_every) if as_grid]
    if drawn:
        from stipple_core.images.images import grid

        images = [picture.image for picture in drawn]
        with one_line_errors():
            print(output.write(grid(images, columns(images)), [p.settings for p in drawn], "grid-", 4))


def draw(command: DrawingCommand, argv: Sequence[str] | None = None) -> None:
    """Run a drawing command; exits with 2 after a user's mistake and with 130 after Ctrl-C."""
    try:
        with short_warnings():
            run(command, sys.argv[1:] if argv is None else argv)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        fix = "use a smaller --height and --width, or --batch-size, or a --window"
        print(f"error: there is not enough memory; {fix}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    except KeyboardInterrupt:
        print("interrupted; finished pictures are kept", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
