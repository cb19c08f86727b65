"""The table of samplers: generators that walk times from noise to data, given nothing but denoise(z_t, t) -> z_0.

They walk times, not sigma / alpha, which is infinite where a rectified flow or a zero-terminal-SNR schedule begins.
The caller owns progress bars, previews and cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ldm.multistep import dpmpp_2m, pndm, unipc
from ldm.onestep import ddim, ddpm, euler, euler_ancestral, heun
from ldm.times import Habit
from ldm.walk import Step


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler and what there is to know of it."""

    run: Callable[..., Iterator[Step]]  # (denoise, z, times, schedule, generators, **options) -> steps
    order: int  # the error falls with steps^-order; of stochastic ones, that of moments
    calls: str = "S"  # of the network in S steps
    draws: bool = False  # whether noise is drawn on the way, whatever eta
    options: tuple[str, ...] = ()  # what `run` takes besides
    habit: Habit  # how it chooses its times

    @property
    def summary(self) -> str:
        """One line: its order, whether it draws, its network calls in S steps, its spacing, what it does."""
        draws = "stochastic" if self.draws else "either by eta" if "eta" in self.options else "deterministic"
        does = (self.run.__doc__ or "").strip().splitlines()[0].rstrip(".")
        return f"order {self.order}  {draws:14} {self.calls:7} calls  {self.habit.spacing:9} {does}"


LATTICE = Habit(spacing="leading", ends_clean=True)  # of papers that step over noise levels
SIGMAS = Habit(spacing="linspace", fractional=True, noise_only=True)  # of Karras et al. 2022 in k-diffusion
SOLVER = Habit(spacing="linspace", drops_lowest=True)  # of Lu et al. 2022

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(run=ddim, order=1, options=("eta",), habit=LATTICE),
    "ddpm": Sampler(run=ddpm, order=1, draws=True, habit=Habit(spacing="leading")),
    "pndm": Sampler(
        run=pndm, order=2, calls="S + 1", options=("averaged",), habit=Habit(spacing="leading", ends_clean=False)
    ),
    "euler": Sampler(run=euler, order=1, habit=SIGMAS),
    "euler_ancestral": Sampler(run=euler_ancestral, order=1, draws=True, habit=SIGMAS),
    "heun": Sampler(run=heun, order=2, calls="2 S - 1", habit=SIGMAS),
    "dpmpp_2m": Sampler(run=dpmpp_2m, order=2, habit=SOLVER),
    "unipc": Sampler(run=unipc, order=3, habit=SOLVER),
}
