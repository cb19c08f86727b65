"""Draw with a model that is not conditioned on text: on a class, a layout, a map, or on nothing.

stipple sample --checkpoint runs/faces/model -n 16 --grid
stipple sample --checkpoint runs/clothes/model --class-name dress --class-name boot
stipple sample --checkpoint runs/shapes/model --layout "circle 0.1 0.1 0.5 0.5; square 0.6 0.6 0.9 0.9"
stipple sample --checkpoint runs/landscapes/model --map labels.png

A class is a name or a number. The boxes of a layout are left, top, right and bottom, from 0 to 1. Each pixel of a map
is the number of a class. Classes and layouts are the prompts of such models, so --prompt is the same flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def check(model: TextToImage) -> None:
    """Raise ValueError for a model that is conditioned on text alone, which would read a class as a caption."""
    if model.conditioner.reads_text and model.conditioner.hint is None:
        raise ValueError("this model draws from text; use stipple draw, or give another with --checkpoint")


COMMAND = DrawingCommand(
    name="sample",
    about=__doc__,
    example="stipple sample --checkpoint runs/clothes/model --class-name dress",
    first=("prompt", "map"),
    prompt="",
    spellings=("--class-name", "--layout"),
    check=check,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
