"""The table of samplers: generators of steps from noise to data, which only need denoise(z_t, t) -> z_0.

They take times, not sigma / alpha, which is infinite at the beginning of a rectified flow or a zero-terminal-SNR
schedule. Progress bars, previews and cancellation are up to the caller.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ldm.samplers.heun import heun
from ldm.samplers.langevin import langevin, predictor_corrector
from ldm.samplers.multistep import deis, dpmpp_2m, dpmpp_3m, lms, pndm, unipc
from ldm.samplers.onestep import ddim, ddpm, euler, euler_ancestral
from ldm.samplers.probability_flow import ode
from ldm.samplers.singlestep import dpm2, dpmpp_2s
from ldm.samplers.spacing import TimeDefaults
from ldm.samplers.steps import Step
from ldm.samplers.stochastic import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, lcm, restart

SHARED_ARGUMENTS = 5  # denoise, z, times, schedule, generators


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler and its properties."""

    run: Callable[..., Iterator[Step]]  # (denoise, z, times, schedule, generators, **options) -> steps
    order: int  # the error falls with steps^-order (of moments, if stochastic); 0: not with the number of steps
    calls: str = "S"  # of the network in S steps
    draws: bool = False  # whether it draws noise, whatever its options
    alone: bool = False  # whether its steps depend on all images of a batch, so that each needs its own
    time_defaults: TimeDefaults  # how it chooses its times

    @functools.cached_property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword arguments that `run` takes besides the five of all samplers."""
        return tuple(inspect.signature(self.run).parameters)[SHARED_ARGUMENTS:]

    @property
    def summary(self) -> str:
        """One line: its order, whether it draws, its network calls in S steps, its spacing, what it does."""
        choice = next((name for name in ("eta", "churn") if name in self.options), None)  # 0 is deterministic
        draws = "stochastic" if self.draws else f"either by {choice}" if choice else "deterministic"
        does = (self.run.__doc__ or "").strip().splitlines()[0].rstrip(".")
        return f"order {self.order}  {draws:15} {self.calls:7} calls  {self.time_defaults.spacing:9} {does}"


LATTICE = TimeDefaults(spacing="leading", ends_clean=True)  # papers that skip noise levels
SIGMAS = TimeDefaults(spacing="linspace", fractional=True, noise_only=True)  # Karras et al. 2022 in k-diffusion
LEVELS = TimeDefaults(spacing="trailing")  # papers that use all noise levels
SOLVER = TimeDefaults(spacing="linspace", drops_lowest=True)  # Lu et al. 2022

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(run=ddim, order=1, time_defaults=LATTICE),
    "ddpm": Sampler(
        run=ddpm,
        order=1,
        draws=True,
        time_defaults=TimeDefaults(spacing="leading"),
    ),
    "pndm": Sampler(
        run=pndm,
        order=2,
        calls="S + 1",
        time_defaults=TimeDefaults(spacing="leading", ends_clean=False),
    ),
    "euler": Sampler(run=euler, order=1, time_defaults=SIGMAS),
    "euler_ancestral": Sampler(run=euler_ancestral, order=1, draws=True, time_defaults=SIGMAS),
    "heun": Sampler(run=heun, order=2, calls="2 S - 1", time_defaults=SIGMAS),
    "dpm2": Sampler(run=dpm2, order=2, calls="2 S - 1", time_defaults=SIGMAS),
    "lms": Sampler(run=lms, order=4, time_defaults=SIGMAS),
    "dpmpp_2s": Sampler(run=dpmpp_2s, order=2, calls="2 S - 1", time_defaults=SOLVER),
    "dpmpp_2m": Sampler(run=dpmpp_2m, order=2, time_defaults=SOLVER),
    "dpmpp_3m": Sampler(run=dpmpp_3m, order=3, time_defaults=SOLVER),
    "dpmpp_sde": Sampler(run=dpmpp_sde, order=2, calls="2 S - 1", draws=True, time_defaults=SIGMAS),
    "dpmpp_2m_sde": Sampler(run=dpmpp_2m_sde, order=2, draws=True, time_defaults=SOLVER),
    "dpmpp_3m_sde": Sampler(run=dpmpp_3m_sde, order=2, draws=True, time_defaults=SOLVER),
    "unipc": Sampler(run=unipc, order=3, time_defaults=SOLVER),
    "deis": Sampler(run=deis, order=2, time_defaults=replace(SOLVER, ends_clean=False)),
    "restart": Sampler(
        run=restart, order=2, calls="3 S - 1", draws=True, time_defaults=SIGMAS
    ),  # one less where S is odd
    "lcm": Sampler(  # a consistency function has no error that falls
        run=lcm, order=0, draws=True, time_defaults=TimeDefaults(spacing="rungs")
    ),
    "langevin": Sampler(  # its step size causes a bias
        run=langevin, order=0, calls="5 S - 4", draws=True, time_defaults=LEVELS
    ),
    "predictor_corrector": Sampler(run=predictor_corrector, order=0, calls="2 S - 1", draws=True, time_defaults=LEVELS),
    "ode": Sampler(run=ode, order=5, calls="any", alone=True, time_defaults=SIGMAS),
}
