"""Repaint the white part of a mask, and keep the rest of the picture.

stipple inpaint photo.png mask.png "a sleeping cat"
stipple inpaint photo.png mask.png "a sleeping cat" --resample 5 --feather 8
stipple inpaint --like outputs/00007.png --seed 7

Every model that draws from prompts can repaint: at each step, the estimate outside the mask is replaced by the latents
of the picture. With --resample N, sampling is divided into 25 parts, and each part is repeated N times, so that new and
old match (RePaint, Lugmayr et al. 2022, arXiv:2201.09865). Multistep samplers, such as dpmpp_2m, start each part
without history; with up to 37 steps, they are then of first order. A model that was trained for inpainting is
conditioned on picture and mask instead. Pixels outside the mask do not change, except for those within --feather.
With --like, all words are prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

COMMAND = DrawingCommand(
    name="inpaint",
    about=__doc__,
    example='stipple inpaint photo.png mask.png "a sleeping cat"',
    files=("image", "mask"),
    first=("resample", "feather"),
    prompt="",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
