"""Addressed randomness: each draw has its own generator, seeded by what is drawn and for which step or sample.

No generator carries state from one draw to the next, so results do not depend on the order of draws, on the number of
processes, or on where a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def generator(seed: int, purpose: str, *address: int) -> torch.Generator:
    """Return a CPU generator whose seed depends only on the arguments.

    Args:
        seed: the run's seed.
        purpose: what is drawn, such as "order", "crop", "noise".
        address: integers that identify the draw, such as (epoch, index) or (step, position in the global batch).
    """
    name = "/".join([str(int(seed)), purpose, *(str(int(a)) for a in address)])
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(seed: int, purpose: str, step: int, positions: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal draws [len(positions), *shape]; each sample is drawn at its own address (step, position)."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, purpose, step, p)) for p in positions])


def uniform(seed: int, purpose: str, step: int, positions: Sequence[int]) -> torch.Tensor:
    """Draws from U[0, 1), shape [len(positions)]; each sample is drawn at its own address (step, position)."""
    return torch.cat([torch.rand(1, generator=generator(seed, purpose, step, p)) for p in positions])
