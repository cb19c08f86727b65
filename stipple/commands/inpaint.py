"""Paint what is white in a mask, and leave the rest of the picture as it is.

stipple inpaint photo.png mask.png "a sleeping cat"
stipple inpaint photo.png mask.png "a sleeping cat" --resample 5 --feather 8
stipple inpaint --like outputs/00007.png --seed 7

Any model that reads prompts can do it: known latents take the place of estimated ones at each step, and with --resample
each of 25 parts of the way is walked several times (RePaint, Lugmayr et al. 2022, arXiv:2201.09865). Samplers that
remember earlier steps, such as dpmpp_2m, begin each part without: of up to 37 steps each is a part, and they are of
first order then. A model that was trained to complete pictures is told picture and mask. Pixels that are not white stay
as they are, but for those that --feather names. With --like, which has image and mask, words are prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

COMMAND = DrawingCommand(
    about=__doc__,
    example='stipple inpaint photo.png mask.png "a sleeping cat"',
    files=("image", "mask"),
    prompt="",
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
