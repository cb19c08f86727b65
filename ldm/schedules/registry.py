"""The table of noise schedules t -> (alpha, sigma) with z_t = alpha z_0 + sigma noise (Song et al. 2021, section 3).

Time t runs from 0 (clean: alpha 1, sigma 0) to 1 (noise). Some schedules are tables of T noise levels, with level
k, counted from 0, at t = (k + 1) / T; the others are formulas.
"""

from __future__ import annotations

from collections.abc import Callable

from ldm.schedules.formulas import edm, flow, sub_vp
from ldm.schedules.noise_schedule import Schedule, ScheduleConfig
from ldm.schedules.table_schedules import cosine, linear, scaled_linear, ve

SCHEDULES: dict[str, Callable[[ScheduleConfig], Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "ve": ve,
    "sub_vp": sub_vp,
    "edm": edm,
    "flow": flow,
}


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Build the schedule that a config names; its `.config` has every default filled in.

    Raises:
        ValueError: an unknown name, a constant out of range, or an option that the schedule does not have.
    """
    if config.name not in SCHEDULES:
        raise ValueError(f"unknown schedule {config.name!r}; use one of {', '.join(SCHEDULES)}")
    if config.timesteps < 2:
        raise ValueError(f"timesteps {config.timesteps} must be at least 2")
    if config.zero_terminal_snr and config.name not in ("linear", "scaled_linear", "cosine"):
        raise ValueError(f"zero_terminal_snr is for linear, scaled_linear and cosine, not {config.name}; unset it")
    return SCHEDULES[config.name](config)
