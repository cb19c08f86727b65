"""Make pictures from prompts.

python txt2img.py "a red heart" "a blue fish"
python txt2img.py --from-file prompts.txt --guidance-scale 4 --num-images 4 --grid
python txt2img.py --like outputs/00007.png --steps 100
"""

from __future__ import annotations

from collections.abc import Sequence

from stipple.commands.draw import Command, draw

COMMAND = Command(about=__doc__, example='txt2img.py "a red heart"')


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
