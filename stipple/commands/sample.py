"""Make pictures with models that read no text: none at all, a class, a layout, a map.

stipple sample --checkpoint runs/faces/model -n 16 --grid
stipple sample --checkpoint runs/clothes/model --class-name dress --class-name boot
stipple sample --checkpoint runs/shapes/model --layout "circle 0.1 0.1 0.5 0.5; square 0.6 0.6 0.9 0.9"
stipple sample --checkpoint runs/landscapes/model --map labels.png

A class is a name or a number, a layout's boxes are left, top, right, bottom from 0 to 1, a map has the number of a
class in each pixel. Classes and layouts are prompts of such models: --prompt is the same flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def check(model: TextToImage) -> None:
    """Raise ValueError for a model of text alone: what is asked for by class or layout would be read as a caption."""
    if model.conditioner.reads_text and model.conditioner.hint is None:
        raise ValueError("this model draws from text; use stipple draw, or give another with --checkpoint")


COMMAND = DrawingCommand(
    about=__doc__,
    example="stipple sample --checkpoint runs/clothes/model --class-name dress",
    prompt="",
    spellings=("--class-name", "--layout"),
    check=check,
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
