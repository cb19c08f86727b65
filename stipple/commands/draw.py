"""Draw pictures from prompts.

stipple draw "a red heart" "a blue fish"
stipple draw --from-file prompts.txt --guidance-scale 4 --num-images 4 --grid
stipple draw --like outputs/00007.png --steps 100
"""

from __future__ import annotations

from collections.abc import Sequence

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

COMMAND = DrawingCommand(name="draw", about=__doc__, example='stipple draw "a red heart"')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
