"""SHA-256 of files and of weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def file_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's contents, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(digest: Any, weights: Mapping[str, Tensor], half: bool = False) -> None:
    """Feed names, shapes and values of weights into a hash, in the order of their names.

    Args:
        digest: a `hashlib` object, which is updated.
        weights: tensors by name.
        half: hash values rounded to float16, so that the hash does not depend on the precision in which weights are
            stored. Otherwise exact values and dtypes are hashed.
    """
    for name, weight in sorted(weights.items()):
        header = f"{name} {tuple(weight.shape)}" if half else f"{name} {weight.dtype} {tuple(weight.shape)}"
        digest.update(header.encode())
        digest.update(raw_bytes(weight.detach().cpu().half() if half else weight))


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's values in order, as uint8."""
    import torch  # here, so that hashing files does not load it

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
