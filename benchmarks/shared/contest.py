"""What the benchmarks share: alternating contenders, the table of their times, and the peak speed of the machine.

Machines are shared with other programs. Ratios are therefore computed round by round from neighboring measurements, and
CPU seconds are listed beside wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a parent process without torch needs little memory, see `peak_memory`
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
OURS = "ours"
WORKDIR = str(Path(tempfile.gettempdir()) / "stipple-benchmarks")  # folder of models, which are written once


@dataclass(frozen=True)
class Times:
    """Times of one contender, one per round."""

    wall: list[float] = field(default_factory=list)  # seconds by the clock
    cpu: list[float] = field(default_factory=list)  # seconds of all threads together

    def add(self, wall: float, cpu: float) -> None:
        """Add the times of a round."""
        self.wall.append(wall)
        self.cpu.append(cpu)


@dataclass(frozen=True)
class Work:
    """The number of operations of a contender by definition, and the peak speed of the machine."""

    flops: float  # floating-point operations
    peak: float  # the same per second, in a large matrix product


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that all speed benchmarks have."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=2, help="of each contender")
    p.add_argument("--rounds", type=int, default=rounds, help="of which the median counts")
    p.add_argument("--tiny", action="store_true", help="small widths, to see whether it runs")
    return p


def measure(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall-clock seconds of a call, and the CPU seconds of all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int, warm_up: bool = True) -> dict[str, Times]:
    """Time all contenders once per round, in reverse order in every other round, after a warm-up round."""
    times = {name: Times() for name in contenders}
    order = list(contenders)
    for index in range(-1 if warm_up else 0, rounds):
        for name in order:
            seconds = measure(contenders[name])
            if index >= 0:
                times[name].add(*seconds)
                note(f"round {index + 1} of {rounds}: {name} {seconds[0]:.2f} s")
        order.reverse()
    return times


def ratios(stipple: Sequence[float], peer: Sequence[float]) -> str:
    """Return the median, smallest and largest ratio of Stipple to a peer over the rounds."""
    by_round = [a / b for a, b in zip(stipple, peer, strict=True)]
    return f"{statistics.median(by_round):.2f} ({min(by_round):.2f} - {max(by_round):.2f})"


def table(times: Mapping[str, Times], work: Work | None = None, unit: str = "") -> str:
    """Return a Markdown table: seconds, CPU seconds, share of the peak, and ratio of Stipple to each peer.

    The fastest peer is marked.
    """
    reference = min((name for name in times if name != OURS), key=lambda name: statistics.median(times[name].wall))
    lines = [
        f"| contender | seconds{unit} (fastest - slowest) | CPU seconds | share of peak | ratio: ours / it | by CPU |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in times.items():
        middle = statistics.median(each.wall)
        share = f"{work.flops / middle / work.peak:.0%}" if work else ""
        cells = [f"**{name}**" if name == reference else name]
        cells += [f"{middle:.3f} ({min(each.wall):.3f} - {max(each.wall):.3f})", f"{statistics.median(each.cpu):.3f}"]
        stipple = times[OURS]
        compared = [ratios(stipple.wall, each.wall), ratios(stipple.cpu, each.cpu)] if each is not stipple else ["", ""]
        cells += [share, *compared]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(threads: int, peak: float | None = None) -> str:
    """Return a line that describes the machine and the versions of the libraries."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    load = f"load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    speed = f"GEMM peak {peak / 1e9:.0f} GFLOP/s; " if peak else ""
    return f"{versions}; {threads} threads of {os.cpu_count()} cores; {speed}{load}"


def gemm_peak(tiny: bool = False, rounds: int = 5) -> float:
    """Measure floating-point operations per second of float32 matrix products; returns the fastest."""
    import torch

    size = 256 if tiny else 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    with torch.inference_mode():
        seconds = [measure(lambda: a @ b)[0] for _ in range(rounds + 1)]
    return 2 * size**3 / min(seconds[1:])


def relative_error(stipple: Tensor, peer: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the peer's output."""
    return ((stipple - peer).norm() / peer.norm()).item()


def require_equal(stipple: Tensor, peer: Tensor, what: str, limit: float = 1e-4) -> None:
    """Raise RuntimeError unless the relative error is below the limit: only equal results can be compared in speed."""
    error = relative_error(stipple, peer)
    if not error < limit:
        raise RuntimeError(f"{what}: relative error {error:.2e} is not below {limit:g}; there is nothing to compare")
    note(f"{what}: relative error {error:.1e}")


def require_alike(stipple: Sequence[Any], peer: Sequence[Any], what: str, limit: int = 2) -> None:
    """Raise RuntimeError unless all 8-bit values of pairs of PIL images differ by at most the limit."""
    import numpy as np

    pairs = zip(stipple, peer, strict=True)
    worst = max(int(abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)
    if worst > limit:
        raise RuntimeError(f"{what}: pictures differ by {worst} of 255, more than {limit}; there is nothing to compare")
    note(f"{what}: pictures within {worst} of 255")


def note(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)
