"""The time from process start to the first PNG with the shipped model: txt2img.py against a diffusers script.

python -m benchmarks.speed.cold_start --checkpoint checkpoints/emoji --rounds 5

New processes alternate, with the same prompt, seed, sampler and steps, and their images are compared. `first_picture`
compares Stipple with a bare `import torch`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.shared import contest, processes

PROMPT = "red heart, fluent 3d style"
THEIRS = "diffusers"


def command(contender: str, options, folder: Path) -> list[str]:
    """Return the command line that writes the image into its own folder."""
    checkpoint, steps, seed = str(Path(options.checkpoint).resolve()), str(options.steps), str(options.seed)
    if contender == contest.OURS:
        flags = ["--checkpoint", checkpoint, "--steps", steps, "--seed", seed, "--sampler", "dpmpp_2m"]
        flags += ["--spacing", "trailing"]  # the spacing that diffusers reads from the folder
        return [str(contest.ROOT / "txt2img.py"), PROMPT, "--outdir", str(folder), *flags]
    script = str(contest.ROOT / "benchmarks/peers/diffusers_emoji.py")
    return [script, checkpoint, PROMPT, str(folder / "picture.png"), steps, seed]


def race(options) -> dict[str, contest.Times]:
    """Return the seconds of the processes of each contender. Raises RuntimeError if their images differ."""
    times = {contest.OURS: contest.Times(), THEIRS: contest.Times()}
    order = list(times)
    for _ in range(options.rounds):
        pictures = {}
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                output, wall, cpu = processes.run_script(*command(name, options, Path(folder)))
                path = output.splitlines()[-1]
                pictures[name] = Image.open(path).convert("RGB")
            times[name].add(wall, cpu)
            contest.note(f"{name}: {wall:.2f} s")
        contest.require_alike([pictures[contest.OURS]], [pictures[THEIRS]], "the first picture")
        order.reverse()
    return times


def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=5)
    parser.add_argument("--checkpoint", default=str(contest.ROOT / "checkpoints/emoji"), help="model folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(argv)
    options.steps = 2 if options.tiny else options.steps
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    times = race(options)
    print(
        f"\nProcess start to PNG, {options.steps} steps\n\n{contest.table(times)}\n\n{contest.machine(options.threads)}"
    )


if __name__ == "__main__":
    main()
