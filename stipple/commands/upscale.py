"""Enlarge a picture with a super-resolution model (Rombach et al. 2022, section 4.4).

stipple upscale small.png --checkpoint runs/upscaler/model
stipple upscale small.png "a castle" --checkpoint runs/upscaler/model --noise-level 0.2 --window 64

The factor is the one that the model was trained for. --noise-level is for models that were trained with noise on the
small picture (Saharia et al. 2022, Imagen): with more noise, the model invents more. If a model was trained on
downscaled pictures only, results are adjusted so that they match the small picture when they are downscaled;
--back-projection 0 turns this off. Use --window for large results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def check(model: TextToImage) -> None:
    """Raise ValueError for a model that does not enlarge pictures."""
    if model.factor == 1:
        raise ValueError("this model was not trained to enlarge pictures; give one that was with --checkpoint")


COMMAND = DrawingCommand(
    name="upscale",
    about=__doc__,
    example="stipple upscale small.png",
    files=("image",),
    first=("noise_level", "window"),
    prompt="",
    check=check,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
