"""Enlarge a picture by the factor that a model of super-resolution was trained for (Rombach et al. 2022, section 4.4).

stipple upscale small.png --checkpoint runs/upscaler/model
stipple upscale small.png "a castle" --checkpoint runs/upscaler/model --noise-level 0.2 --window 64

--noise-level is for models that were trained with noise on the small picture (Saharia et al. 2022, Imagen): the more of
it, the more is invented. Of a model that was trained on pictures which were made smaller and nothing else, results are
changed a little, so that they shrink to the picture that was given: --back-projection 0 leaves them. Large results are
made in windows: --window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stipple.commands.drawing.drawing_command import DrawingCommand, draw

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage


def check(model: TextToImage) -> None:
    """Raise ValueError for a model that enlarges nothing."""
    if model.factor == 1:
        raise ValueError("this model was not trained to enlarge pictures; give one that was with --checkpoint")


COMMAND = DrawingCommand(about=__doc__, example="stipple upscale small.png", files=("image",), prompt="", check=check)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
