"""Runs a program and logs its memory: `python memory_runs.py OUT EVERY train|sample ARGUMENTS...`.

Appends [step or image number, resident bytes, open files] as a line of JSON to OUT every EVERY steps or images. `train`
takes a script and its arguments, `sample` a model folder and a number of images.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch


def resident() -> int:
    """Resident bytes of this process, after free memory was returned to the system.

    Free memory varies by 5 MiB, which would hide a growth of 1 MiB.
    """
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Number of open files of this process, without the folder that is listed here."""
    return len(os.listdir("/proc/self/fd")) - 1


def logger(out: str, every: int) -> Callable[[int], None]:
    """Return a function that writes a line for every EVERY-th number."""
    last = 0

    def note(number: int) -> None:
        nonlocal last
        if number % every == 0 and number != last:
            last = number
            with open(out, "a") as file:
                file.write(json.dumps([number, resident(), open_files()]) + "\n")

    return note


def train(note: Callable[[int], None], script: str, *arguments: str) -> None:
    """Run the `main` of a script."""
    from stipple.training.trainer import Trainer

    steps = Trainer.steps

    def watched(self, *arguments, **options):
        for batch in steps(self, *arguments, **options):
            yield batch
            note(self.step)

    Trainer.steps = watched
    __import__(script.removesuffix(".py")).main(arguments)


def sample(note: Callable[[int], None], model: str, pictures: str) -> None:
    """Generate images one after the other."""
    from ldm.pipeline import TextToImage

    draw = TextToImage.load(model)
    for number in range(1, int(pictures) + 1):
        draw(["a cat", "two cats"][number % 2], seed=number, steps=4)
        note(number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train, "sample": sample}[sys.argv[3]](logger(sys.argv[1], int(sys.argv[2])), *sys.argv[4:])
