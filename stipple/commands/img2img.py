"""Change a picture: begin at its noised latents, not at noise (SDEdit, Meng et al. 2021, arXiv:2108.01073).

stipple img2img photo.png "an oil painting" --strength 0.6
stipple img2img sketch.png "a red heart" --strength 0.8 --num-images 4 --grid
stipple img2img --like outputs/00007.png "a watercolor" --strength 0.4

Of --steps, the last steps * strength are taken: at 0.6, 30 of 50; at 1 all of them, from noise alone. The default is
0.75. A model of the image's embedding imitates it at any strength. With --like, which has an image, words are prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

COMMAND = DrawingCommand(
    about=__doc__, example='stipple img2img photo.png "an oil painting"', files=("image",), prompt=""
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
