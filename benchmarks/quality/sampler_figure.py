"""Paths of samplers on a 2-D mixture whose denoiser is known exactly, and their error against network calls.

python -m benchmarks.quality.sampler_figure --output docs/samplers.png

The upper panels, one per sampler, show paths from the same noise with about 16 calls to the density of the data, in
gray; rings mark the ends of the exact probability flow. The lower panels show the distance of deterministic samplers
from those ends, and of stochastic ones from the distribution of the data, for more and more calls.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.quality.gaussians import Gaussians
from benchmarks.shared.contest import note
from ldm.guidance.classifier_free import Denoise
from ldm.samplers.registry import SAMPLERS, Sampler
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule

SCHEDULE = make_schedule(ScheduleConfig())
DATA = Gaussians(
    torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64),
    torch.tensor([[-1.1, -0.6], [0.3, 1.1], [1.2, -0.7]], dtype=torch.float64),
    torch.tensor([0.18, 0.28, 0.12], dtype=torch.float64),
)
DENOISE = DATA.denoiser(SCHEDULE)
SPACING = "log_snr"
CALLS = 16  # network calls of a plotted path
BUDGETS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PATIENT = {"langevin": 96, "restart": 32}  # calls of a plotted path of samplers that need more
PATHS, FEW_PATHS = 9, 3  # paths per panel: of deterministic samplers, and of stochastic ones, whose paths cross
POINTS, CLOUD = 500, 20_000  # points for the flow error, and for the distribution error
EDGE = 2.3  # the panels show [-EDGE, EDGE]
BLUE, ORANGE = "#1f69b4", "#d95f0e"
UNFIT = {"ode": "chooses its own steps", "lcm": "needs a distilled network"}  # samplers without a curve


@dataclass
class Counted:
    """A denoiser that counts its calls."""

    calls: int = 0

    def __call__(self, z_t: Tensor, t: float) -> Tensor:
        self.calls += 1
        return DENOISE(z_t, t)


def noise(count: int) -> Tensor:
    """Return initial noise, [1, count, 2]."""
    return initial_noise((1, count, 2), seeds(0), SCHEDULE).double()


def seeds(seed: int) -> list[torch.Generator]:
    """Return one random generator, because all points form one image."""
    return [torch.Generator().manual_seed(seed)]


def run(sampler: Sampler, z: Tensor, steps: int, **options: Any) -> tuple[list[Tensor], int]:
    """Run a sampler; returns z at all of its steps + 1 times, and the number of network calls."""
    denoise: Denoise = Counted()
    visited = times(SCHEDULE, steps, SPACING, sampler.time_defaults, ends_clean=True)
    return [z, *(s.z for s in sampler.run(denoise, z, visited, SCHEDULE, seeds(1), **options))], denoise.calls


@functools.cache
def calls_of(sampler: Sampler, steps: int) -> int:
    """Return the number of network calls of `steps` steps."""
    return run(sampler, noise(1), steps)[1]


def steps_for(sampler: Sampler, budget: int) -> int | None:
    """Return the largest number of steps whose network calls are within the budget; None if there is none."""
    return max((steps for steps in range(1, budget + 1) if calls_of(sampler, steps) <= budget), default=None)


def exact(z: Tensor) -> Tensor:
    """Return the end points of the exact probability flow from z, [1, N, 2]."""
    visited = torch.tensor([1.0, 1 / SCHEDULE.config.timesteps, 0.0], dtype=torch.float64)
    *_, last = SAMPLERS["ode"].run(DENOISE, z, visited, SCHEDULE, seeds(1), tolerance=1e-9)
    return last.z


def flow_error(sampler: Sampler, z: Tensor, ends: Tensor, steps: int) -> float:
    """Return the root mean square distance of points from the end points of their exact flow."""
    return (run(sampler, z, steps)[0][-1] - ends).square().sum(-1).mean().sqrt().item()


def distribution_error(sampler: Sampler, z: Tensor, data: Tensor, steps: int) -> float:
    """Return the sliced Wasserstein distance of samples from data [N, 2]; it is above 0 for finite samples."""
    return sliced(run(sampler, z, steps)[0][-1][0], data)


def sliced(a: Tensor, b: Tensor) -> float:
    """Return the sliced Wasserstein distance of two point clouds [N, 2] over 32 directions."""
    angles = torch.arange(32, dtype=torch.float64) * math.pi / 32
    directions = torch.stack([angles.cos(), angles.sin()])  # [2, 32]
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt().item()


def errors(budgets: Sequence[int]) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """Return points (calls, error) of each sampler.

    The first dictionary has the errors of deterministic samplers against the exact flow, the second those of stochastic
    samplers against the data.
    """
    flow: dict[str, list[tuple[int, float]]] = {}
    spread: dict[str, list[tuple[int, float]]] = {}
    z, cloud, data = noise(POINTS), noise(CLOUD), DATA.sample(CLOUD, seeds(2)[0])
    ends = exact(z)
    for name, sampler in SAMPLERS.items():
        if name in UNFIT:
            continue
        note(name)
        for steps in dict.fromkeys(steps_for(sampler, budget) for budget in budgets):
            if steps is not None:
                calls = calls_of(sampler, steps)
                if sampler.draws:
                    point = calls, distribution_error(sampler, cloud, data, steps)
                else:
                    point = calls, flow_error(sampler, z, ends, steps)
                (spread if sampler.draws else flow).setdefault(name, []).append(point)
    return flow, spread


def draw_paths(axes: Any, name: str, grid: tuple[Tensor, Tensor, Tensor]) -> None:
    """Plot the paths of one sampler."""
    sampler, z = SAMPLERS[name], noise(PATHS)
    steps = CALLS if name == "ode" else steps_for(sampler, PATIENT.get(name, CALLS))
    states, calls = run(sampler, z, steps, **({"tolerance": 1e-2} if name == "ode" else {}))
    axes.contourf(*grid, levels=8, cmap="Greys", alpha=0.7)
    path = torch.stack(states)[:, 0].numpy()  # [steps + 1, N, 2]
    for point in range(FEW_PATHS if sampler.draws else PATHS):
        axes.plot(*path[:, point].T, "-o", color=ORANGE if sampler.draws else BLUE, ms=2, lw=0.9)
    axes.plot(*path[-1].T, "o", color="black", ms=3)
    if not sampler.draws:
        axes.plot(*exact(z)[0].T.numpy(), "o", color="black", mfc="none", ms=7, lw=0.8)
    axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), xticks=[], yticks=[], aspect="equal")
    axes.set_title(f"{name}, {calls} calls", fontsize=10)


def draw_errors(axes: Any, curves: dict[str, list[tuple[int, float]]], title: str) -> None:
    """Plot error over calls on logarithmic axes, with the name of each sampler at the end of its curve."""
    for index, (name, points) in enumerate(curves.items()):
        style = "--" if index >= 10 else "-"  # there are ten colors
        axes.loglog(*zip(*points, strict=True), style, marker="o", ms=3, lw=1.4, label=name)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("network calls")
    axes.set_xlim(2.8, 1.1 * BUDGETS[-1])
    axes.set_xticks(BUDGETS[::2], [str(budget) for budget in BUDGETS[::2]])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)


def figure(budgets: Sequence[int]) -> Figure:
    """Draw the whole figure."""
    columns = 7
    rows = -(-len(SAMPLERS) // columns)
    page = Figure(figsize=(15, 2.3 * rows + 5.6), layout="constrained")
    above, below = page.subfigures(2, 1, height_ratios=[2.3 * rows, 5.6])
    line = torch.linspace(-EDGE, EDGE, 120, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = x.numpy(), y.numpy(), DATA.density(torch.stack([x, y], -1)).sqrt().numpy()
    panels = above.subplots(rows, columns).flatten()
    for name, axes in zip(SAMPLERS, panels, strict=False):
        draw_paths(axes, name, grid)
    for axes in panels[len(SAMPLERS) :]:
        axes.remove()
    above.suptitle(
        "From the same nine points of noise to data (gray). Blue: deterministic; rings: where the exact probability "
        "flow ends. Orange: stochastic, three of nine paths.",
        fontsize=12,
    )
    flow, spread = errors(budgets)
    left, right = below.subplots(1, 2)
    draw_errors(left, flow, "Deterministic: distance from the exact flow's end")
    draw_errors(right, spread, "Stochastic: Wasserstein distance from the data's distribution")
    floor = sliced(DATA.sample(CLOUD, seeds(3)[0]), DATA.sample(CLOUD, seeds(4)[0]))
    right.axhline(floor, color="black", lw=0.8)
    right.annotate("two samples of the data", (3, floor), xytext=(0, -11), textcoords="offset points", fontsize=8)
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/samplers.png")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="network calls")
    options = parser.parse_args(argv)
    figure(options.budgets).savefig(Path(options.output), dpi=100)


if __name__ == "__main__":
    main()
