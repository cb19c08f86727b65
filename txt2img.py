"""Draw pictures from prompts; `stipple draw` is the same command, in stipple/commands/draw.py.

python txt2img.py "a red heart" "a blue fish"
python txt2img.py --like outputs/00007.png --steps 100
"""

from stipple.commands.draw import main

if __name__ == "__main__":
    main()
