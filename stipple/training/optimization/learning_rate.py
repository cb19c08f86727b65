"""Learning-rate schedules: warm-up, then constant, cosine, linear, or stable with a short decay at the end (wsd)."""

from __future__ import annotations

import math
from collections.abc import Callable


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


# share of the learning rate after a share of the steps that follow the warm-up (of wsd: of the decay)
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _linear,
}


def scheduled_rate(
    schedule: str, peak: float, step: int, steps: int, warmup_steps: int = 0, decay_steps: int = 0
) -> float:
    """The learning rate of a step.

    With wsd, the rate depends on `steps` only in the last `decay_steps`. Such a run can be made longer, or be ended,
    at any time (Hu et al. 2024, arXiv:2404.06395, section 4).

    Args:
        schedule: a key of `SCHEDULES`.
        peak: the learning rate after the warm-up.
        step: number of the optimizer step, from 0.
        steps: number of optimizer steps of the run.
        warmup_steps: the first steps, in which the rate rises linearly.
        decay_steps: of wsd, the last steps, in which the rate falls linearly to zero.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    first = max(warmup_steps, steps - decay_steps) if schedule == "wsd" else warmup_steps
    progress = (step - first) / max(1, steps - first)
    return peak * SCHEDULES[schedule](min(1.0, max(0.0, progress)))
