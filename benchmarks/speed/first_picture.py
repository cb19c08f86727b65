"""The time to the first image: txt2img.py from process start to the PNG, `--help`, and sampling alone.

python -m benchmarks.speed.first_picture --checkpoint checkpoints/emoji --output docs/first_picture.md

The processes alternate with `python -c "import torch"` and `python -c pass`, which are lower limits. A busy machine
slows all of them, so that ratios hardly change.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "red heart, fluent 3d style"
BARE_TORCH, BARE = 'python -c "import torch"', "python -c pass"
PICTURE, HELP = "txt2img.py, to the PNG", "txt2img.py --help"
FIRST, SAMPLING = "sampling alone, first in a process", "sampling alone"
LIMITS = {PICTURE: 10.0, HELP: 1.0, SAMPLING: 2.0}  # seconds, on a machine with 2 cores
BESIDE = {PICTURE: BARE_TORCH, HELP: BARE}  # the bare process that each is compared with


def run_bare(code: str) -> float:
    """Return the seconds of a Python process that runs `code`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def run_help() -> float:
    """Return the seconds from the start of a process to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "txt2img.py"), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def run_picture(checkpoint: str) -> float:
    """Return the seconds from process start to the line with the name of the PNG. Raises RuntimeError without one."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as complaints:
        command = [sys.executable, str(ROOT / "txt2img.py"), PROMPT, "--checkpoint", checkpoint, "--outdir", folder]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process:
            path = process.stdout.readline().strip()
            seconds = time.perf_counter() - began
        if process.returncode or not Path(path).is_file():
            complaints.seek(0)
            raise RuntimeError(f"txt2img.py made no picture: {complaints.read().strip()}")
    return seconds


def run_sampling(checkpoint: str, runs: int) -> tuple[list[float], str]:
    """Time sampling in this process; returns the seconds of each run and a description of the model's defaults."""
    import torch

    sys.path.insert(0, str(ROOT))
    from ldm import TextToImage

    model = TextToImage.load(checkpoint)
    (batch,) = model.batches(model.plan(PROMPT), 1)
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        for _ in model.sample(batch):
            pass
        seconds.append(time.perf_counter() - began)
    same = batch[0]
    words = f"{same.sampler}, {same.steps} steps, guidance scale {same.guidance_scale:g}, {same.height} x {same.width}"
    return seconds, f"{words} pixels; torch {torch.__version__}, {torch.get_num_threads()} threads"


def table(seconds: dict[str, list[float]]) -> str:
    """Return a Markdown table of medians, with their range, limit, and ratio to a bare process."""
    lines = ["| what | median s | fastest - slowest s | at most s | ratio to bare |", "|---|---|---|---|---|"]
    for name, values in seconds.items():
        limit = f"{LIMITS[name]:g}" if name in LIMITS else ""
        middle = statistics.median(values)
        ratio = f"{middle / statistics.median(seconds[BESIDE[name]]):.2f}" if name in BESIDE else ""
        spread = f"{min(values):.2f} - {max(values):.2f}"
        lines.append(f"| `{name}` | {middle:.2f} | {spread} | {limit} | {ratio} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/emoji", help="model folder")
    parser.add_argument("--runs", type=int, default=5, help="of each process, and of sampling")
    parser.add_argument("--output", help="Markdown file to write as well")
    options = parser.parse_args(argv)
    seconds: dict[str, list[float]] = {name: [] for name in (BARE_TORCH, PICTURE, BARE, HELP)}
    for _ in range(options.runs):
        seconds[BARE_TORCH].append(run_bare("import torch"))
        seconds[PICTURE].append(run_picture(options.checkpoint))
        seconds[BARE].append(run_bare("pass"))
        seconds[HELP].append(run_help())
    walks, words = run_sampling(options.checkpoint, options.runs)
    seconds[FIRST], seconds[SAMPLING] = walks[:1], walks[1:]
    load = f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    page = f"{table(seconds)}\n\n{words}; {load}; {options.runs} runs of each.\n"
    print(page)
    if options.output:
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# The first picture\n\n{page}")


if __name__ == "__main__":
    main()
