"""The tables of a noise schedule that CompVis' files hold beside the weights (Ho et al. 2020, eqs. 4, 6, 7)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from ldm.schedules.table_schedules import VariancePreserving

BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def schedule_buffers(config: ScheduleConfig) -> dict[str, Tensor]:
    """All BUFFERS of T steps, each [T] float32; without zero terminal SNR, which programs apply themselves.

    Raises:
        ValueError: the schedule is not variance-preserving, so that it has no betas.
    """
    schedule = make_schedule(replace(config, zero_terminal_snr=False))
    if not isinstance(schedule, VariancePreserving):
        raise ValueError(f"schedule {config.name!r} can't be stored in a CompVis file; only schedules of betas can")
    steps = config.timesteps
    kept = schedule((torch.arange(steps, dtype=torch.float64) + 1) / steps)[0].square()  # [T] alpha bar
    before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    betas = 1 - kept / before
    variance = betas * (1 - before) / (1 - kept)
    values = (
        betas,
        kept,
        before,
        kept.sqrt(),
        (1 - kept).sqrt(),
        (1 - kept).log(),
        (1 / kept).sqrt(),
        (1 / kept - 1).sqrt(),
        variance,
        variance.clamp(min=1e-20).log(),
        betas * before.sqrt() / (1 - kept),
        (1 - before) * (1 - betas).sqrt() / (1 - kept),
    )
    return {name: value.float() for name, value in zip(BUFFERS, values, strict=True)}
