"""A program with its memory watched: `python memory_runs.py OUT EVERY train|sample ARGUMENTS...`.

Appends [step or picture, resident bytes, open files] as a line of JSON to OUT, at every EVERY-th of them. `train` takes
a script and its arguments, `sample` a model folder and how many pictures.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch


def resident() -> int:
    """Bytes of this process that are in memory, without those that the allocator keeps though nobody holds them.

    Those come and go by 5 MiB, which hides a drift of one.
    """
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """File descriptors of this process, without the one that this question opens."""
    return len(os.listdir("/proc/self/fd")) - 1


def noting(out: str, every: int) -> Callable[[int], None]:
    """What writes a line, at the numbers that are due."""
    last = 0

    def note(number: int) -> None:
        nonlocal last
        if number % every == 0 and number != last:
            last = number
            with open(out, "a") as file:
                file.write(json.dumps([number, resident(), open_files()]) + "\n")

    return note


def train(note: Callable[[int], None], script: str, *arguments: str) -> None:
    """Run a script's `main`."""
    from stipple.training.trainer import Trainer

    steps = Trainer.steps

    def watched(self, *given, **named):
        for batch in steps(self, *given, **named):
            yield batch
            note(self.step)

    Trainer.steps = watched
    __import__(script.removesuffix(".py")).main(arguments)


def sample(note: Callable[[int], None], model: str, pictures: str) -> None:
    """Draw pictures, one after the other."""
    from ldm.pipeline import TextToImage

    draw = TextToImage.load(model)
    for number in range(1, int(pictures) + 1):
        draw(["a cat", "two cats"][number % 2], seed=number, steps=4)
        note(number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train, "sample": sample}[sys.argv[3]](noting(sys.argv[1], int(sys.argv[2])), *sys.argv[4:])
