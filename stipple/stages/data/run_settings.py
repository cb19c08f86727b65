"""Checks of the settings that all runs have, and the settings that changed since a run was stopped.

Settings that do not affect what is learned (how long, how often, on which hardware, from where) may change without a
warning.
"""

from __future__ import annotations

from typing import Any

from stipple.training.run.metrics import flat
from stipple_core.config import read_yaml, to_dict

SEEDS = range(-(2**63), 2**64)  # supported by torch
SHOWN = 5  # changed settings that are named
FREE = {  # settings, and groups of settings, that may change when a run is resumed
    "run", "init_from", "cache", "cache_contexts", "checkpointing", "save_precision", "samples", "validation",
    "data.folder", "data.shards", "data.dataset", "data.index", "data.verify", "data.max_bad_fraction", "data.maps",
    "preservation.folder", "conditioner.retrieval.database",
    "trainer.steps", "trainer.micro_batch_size", "trainer.compile", "trainer.save_every", "trainer.keep",
    "trainer.log_every", "trainer.trackers", "trainer.workers", "trainer.max_minutes", "trainer.timeout_minutes",
    "trainer.max_bad_steps", "trainer.resume",
}  # fmt: skip


def check_run(run: str, seed: int) -> None:
    """Raise ValueError for an empty run folder name, or for a seed that torch does not support."""
    if not run.strip():
        raise ValueError(f"run is {run!r}; set it to the name of the run folder, such as runs/mine")
    if seed not in SEEDS:
        raise ValueError(f"seed {seed} must be from -2**63 to 2**64 - 1; use a smaller number, such as 0")


def changes(config: Any, path: str) -> str:
    """The settings that differ from a YAML file and affect results: "seed 0 -> 1, ..."; "" if none or no file."""
    try:
        before = flat(read_yaml(path))
    except (OSError, ValueError):
        return ""
    now = flat(to_dict(config))
    names = [name for name in now if not _is_free(name) and name in before and before[name] != now[name]]
    shown = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names[:SHOWN])
    return shown + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in FREE for count in range(1, len(parts) + 1))
