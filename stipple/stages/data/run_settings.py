"""Settings of both stages: a folder and a seed that can be used, and a word where a run goes on with other ones.

What only says how long, how often, with which hardware or from where, and not what is learned, may change in silence.
"""

from __future__ import annotations

from typing import Any

from stipple.training.run.metrics import flat
from stipple_core.config import read_yaml, to_dict

SEEDS = range(-(2**63), 2**64)  # that torch takes
SHOWN = 5  # changed settings named
FREE = {  # a setting, or a group of them, that a run may go on with another value of
    "run", "init_from", "cache", "cache_contexts", "checkpointing", "save_precision", "samples", "validation",
    "data.folder", "data.shards", "data.dataset", "data.index", "data.verify", "data.max_bad_fraction", "data.maps",
    "preservation.folder", "conditioner.retrieval.database",
    "trainer.steps", "trainer.micro_batch_size", "trainer.compile", "trainer.save_every", "trainer.keep",
    "trainer.log_every", "trainer.trackers", "trainer.workers", "trainer.max_minutes", "trainer.timeout_minutes",
    "trainer.max_bad_steps", "trainer.resume",
}  # fmt: skip


def check_run(run: str, seed: int) -> None:
    """ValueError for a run folder without a name, which would be the current folder, or a seed torch doesn't take."""
    if not run.strip():
        raise ValueError(f"run is {run!r}; name the folder that is to hold the run, such as runs/mine")
    if seed not in SEEDS:
        raise ValueError(f"seed {seed} must be from -2**63 to 2**64 - 1; use a smaller one, such as 0")


def changes(config: Any, path: str) -> str:
    """What is learned with other settings than those in a YAML file: "seed 0 -> 1, ..."; "" if nothing, or no file."""
    try:
        before = flat(read_yaml(path))
    except (OSError, ValueError):
        return ""
    now = flat(to_dict(config))
    names = [name for name in now if not _is_free(name) and name in before and before[name] != now[name]]
    told = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names[:SHOWN])
    return told + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in FREE for count in range(1, len(parts) + 1))
