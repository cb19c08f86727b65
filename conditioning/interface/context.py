"""Everything that a denoiser is conditioned on besides z_t and t: tokens, a vector, latents, or any subset of them.

Cross-attention reads the tokens (Rombach et al. 2022, section 3.3). `drop_context` implements caption dropout
(Ho & Salimans 2022, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS = ("tokens", "mask", "vector", "latents", "guidance")


@dataclass(frozen=True, kw_only=True)
class Context:
    """Condition of B members of a batch; fields that are None are absent.

    Raises:
        ValueError: The fields differ in batch size, or the mask has another shape than the tokens.
    """

    tokens: Tensor | None = None  # [B, L, d], read by cross-attention
    mask: Tensor | None = None  # [B, L] bool, True for tokens to attend to; None: attend to all
    vector: Tensor | None = None  # [B, v], added to the time embedding
    latents: Tensor | None = None  # [B, c, h, w], concatenated to z_t
    guidance: Tensor | None = None  # [B] guidance scale, read by networks distilled from a guided model

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in FIELDS if getattr(self, name) is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the fields of a context must have one batch size, not {sizes}")
        if self.mask is not None and (self.tokens is None or self.mask.shape != self.tokens.shape[:2]):
            tokens = None if self.tokens is None else tuple(self.tokens.shape)
            raise ValueError(f"mask {tuple(self.mask.shape)} does not fit tokens {tokens}; it must be [B, L]")

    @property
    def batch_size(self) -> int:
        """B. Raises ValueError if the context has no fields."""
        for name in FIELDS:
            if getattr(self, name) is not None:
                return len(getattr(self, name))
        raise ValueError("a context without tokens, vector, latents and guidance has no batch size")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Context:
        """Return the context on another device, or with floating-point fields in another dtype."""
        return self._each(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def select(self, index: slice | int | Tensor) -> Context:
        """Return the members that a slice, an integer (batch of 1) or an index tensor [K] selects."""
        if isinstance(index, int):
            if not -self.batch_size <= index < self.batch_size:
                raise IndexError(f"index {index} is out of range for a context with batch size {self.batch_size}")
            index = slice(index, index + 1 or None)
        return self._each(lambda x: x[index])

    def repeat(self, n: int) -> Context:
        """Expand a batch of 1 to n members, as views without a copy; a context without fields is returned as it is."""
        sizes = {name: len(getattr(self, name)) for name in FIELDS if getattr(self, name) is not None}
        if any(size != 1 for size in sizes.values()):
            raise ValueError(f"only a context of batch size 1 can be repeated, not {sizes}")
        return self._each(lambda x: x.expand(n, *x.shape[1:]))

    def cat(self, other: Context) -> Context:
        """Concatenate two contexts along the batch: [B1 + B2, ...].

        The shorter tokens are padded with zeros. The mask, which is created if neither has one, hides the padding.

        Raises:
            ValueError: A field is present in only one of the contexts.
        """
        return self._join(other, lambda a, b: torch.cat([a, b]))

    def where(self, keep: Tensor, other: Context) -> Context:
        """Select members: from this context where `keep` [B] bool is True, else from `other` (batch B or 1).

        A context without fields is returned as it is.
        """

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        size = self.batch_size if any(getattr(self, name) is not None for name in FIELDS) else len(keep)
        if keep.dtype != torch.bool or keep.shape != (size,):
            raise ValueError(f"keep must be bool [{size}], not {keep.dtype} {tuple(keep.shape)}")
        return self._join(other, choose)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Context:
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return Context(**{name: None if x is None else change(x) for name, x in present.items()})

    def _join(self, other: Context, join: Callable[[Tensor, Tensor], Tensor]) -> Context:
        for name in ("tokens", "vector", "latents", "guidance"):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise ValueError(f"one context has {name} and the other has none; make both with the same conditioner")
        a, b = self, other
        if a.tokens is not None and (a.tokens.shape[1] != b.tokens.shape[1] or (a.mask is None) != (b.mask is None)):
            length = max(a.tokens.shape[1], b.tokens.shape[1])
            a, b = _padded(a, length), _padded(b, length)
        joined = {name: (getattr(a, name), getattr(b, name)) for name in FIELDS}
        return Context(**{name: None if x is None else join(x, y) for name, (x, y) in joined.items()})


def concatenate(contexts: Sequence[Context]) -> Context:
    """Concatenate contexts along the batch; all must have the same fields and number of tokens."""
    present = [name for name in FIELDS if getattr(contexts[0], name) is not None]
    return Context(**{name: torch.cat([getattr(each, name) for each in contexts]) for name in present})


def _padded(context: Context, length: int) -> Context:
    """Pad the tokens with zeros to `length`, and mask the padding."""
    tokens, mask = context.tokens, context.mask
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    extra = length - tokens.shape[1]
    return replace(
        context,
        tokens=F.pad(tokens, (0, 0, 0, extra)),  # [B, L, d] -> [B, length, d]
        mask=F.pad(mask, (0, extra)),  # [B, L] -> [B, length]
    )
