"""The noise schedule in the single files of CompVis and Stability, from the tables beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule

PREDICTIONS = {"eps": "noise", "x0": "clean", "v": "velocity"}
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}  # CompVis' names -> Stipple's
PUBLISHED_BETAS = [(0.00085, 0.012), (0.0015, 0.0195), (0.0015, 0.0205), (0.0015, 0.0155), (0.0015, 0.015)]


def schedule_from_compvis(
    weights: Mapping[str, Tensor], params: Mapping[str, Any] | None = None
) -> tuple[ScheduleConfig, str]:
    """The noise schedule of a whole file, and the prediction of its network, a key of PREDICTIONS in ldm.denoising.

    Args:
        weights: with the buffers `betas` or `alphas_cumprod`, which nearly all files have and which take precedence.
        params: `model.params` of the YAML: beta_schedule, linear_start, linear_end, timesteps; the defaults are
            SD's. Specify `parameterization` "v" for SD2 at 768 pixels, and "x0" for models of clean latents: weights do
            not determine the prediction, and the default is noise.

    Raises:
        ValueError: the buffers or the YAML describe a schedule that is not supported.
    """
    params = params or {}
    kind, target = params.get("beta_schedule", "linear"), params.get("parameterization", "eps")
    for option, value, names in (
        ("beta_schedule", kind, BETA_SCHEDULES),
        ("parameterization", target, PREDICTIONS),
    ):
        if value not in list(names):  # a list, since the value may not be hashable
            raise ValueError(f"{option} {value!r} is not implemented; only {', '.join(names)} are")
    betas = (params.get("linear_start", 0.00085), params.get("linear_end", 0.012))
    config = _fitted(weights) or _schedule(BETA_SCHEDULES[kind], params.get("timesteps", 1000), betas)
    return config, PREDICTIONS[target]


def _fitted(weights: Mapping[str, Tensor]) -> ScheduleConfig | None:
    """The schedule whose table is in the buffers, with the roundest constants in precision; None without buffers."""
    name = next((name for name in ("alphas_cumprod", "betas") if name in weights), None)
    if name is None:
        return None
    if weights[name].dim() != 1 or len(weights[name]) < 2 or not weights[name].is_floating_point():
        description = f"of shape {list(weights[name].shape)} in {weights[name].dtype}"
        raise ValueError(f"{name} is {description}, not a list of floating-point numbers; remove it to take the YAML's")
    table, levels = weights[name].double(), len(weights[name])  # [T]
    betas = table if name == "betas" else _betas(table)
    for candidate in _candidates(levels, betas[0].item(), betas[-1].item()):
        alpha, _ = make_schedule(candidate)((torch.arange(levels, dtype=torch.float64) + 1) / levels)
        ours = _betas(alpha.square()) if name == "betas" else alpha.square()
        precision = torch.finfo(weights[name].dtype)
        if torch.allclose(ours, table, rtol=max(2 * precision.eps, 1e-6), atol=precision.smallest_normal):
            return candidate
    raise ValueError(
        f"the noise schedule in the file is none that is implemented: {name} has {levels} levels, from "
        f"{table[0].item():.6g} to {table[-1].item():.6g}; remove alphas_cumprod and betas to take the YAML's"
    )


def _betas(alpha_bar: Tensor) -> Tensor:
    """The variance that each step adds [T], from alpha^2 [T]."""
    return 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def _candidates(levels: int, start: float, end: float) -> Iterator[ScheduleConfig]:
    """Candidates with this many levels: published ones, then those of this first and last beta, the roundest first."""
    rounded = [(float(f"{start:.{digits}g}"), float(f"{end:.{digits}g}")) for digits in range(2, 9)]
    for zero_terminal_snr in (False, True):
        for name in ("scaled_linear", "linear"):
            for betas in (*PUBLISHED_BETAS, *rounded):
                if 0 < betas[0] <= betas[1] < 1:
                    yield _schedule(name, levels, betas, zero_terminal_snr)
        yield _schedule("cosine", levels, zero_terminal_snr=zero_terminal_snr)


def _schedule(
    name: str, timesteps: int, betas: tuple[float, float] | None = None, zero_terminal_snr: bool = False
) -> ScheduleConfig:
    start, end = (None, None) if name == "cosine" else betas
    return ScheduleConfig(
        name=name, timesteps=timesteps, beta_start=start, beta_end=end, zero_terminal_snr=zero_terminal_snr
    )
