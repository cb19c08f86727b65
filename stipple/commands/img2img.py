"""Change a picture as a prompt describes (SDEdit, Meng et al. 2021, arXiv:2108.01073).

stipple img2img photo.png "an oil painting" --strength 0.6
stipple img2img sketch.png "a red heart" --strength 0.8 --num-images 4 --grid
stipple img2img --like outputs/00007.png "a watercolor" --strength 0.4

Sampling starts from the noised picture instead of noise, and takes the last steps * strength of the steps: with
--strength 0.6, 30 of 50 steps; with 1, all of them, and nothing of the picture is left. The default is 0.75. A model
that is conditioned on image embeddings imitates the picture at any strength. With --like, all words are prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

COMMAND = DrawingCommand(
    name="img2img",
    about=__doc__,
    example='stipple img2img photo.png "an oil painting"',
    files=("image",),
    first=("strength",),
    prompt="",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
