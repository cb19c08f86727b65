"""Change a picture: begin at its noised latents, not at noise (SDEdit, Meng et al. 2021, arXiv:2108.01073).

python img2img.py photo.png "an oil painting" --strength 0.6
python img2img.py sketch.png "a red heart" --strength 0.8 --num-images 4 --grid
python img2img.py --like outputs/00007.png "a watercolor" --strength 0.4

Of --steps, the last steps * strength are taken: at 0.6, 30 of 50; at 1 all of them, from noise alone. The default is
0.75. A model of the image's embedding imitates it at any strength. With --like, which has an image, words are prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from drawing import Command, draw

COMMAND = Command(about=__doc__, example='img2img.py photo.png "an oil painting"', files=("image",), prompt="")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    draw(COMMAND, argv)


if __name__ == "__main__":
    main()
