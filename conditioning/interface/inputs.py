"""What pictures are to be made of, before any network has read it: prompts, and what there is besides them.

`Context` is what a denoiser is told; a conditioner makes it of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TENSORS = ("hint", "image", "frame", "embedding", "dropped")


@dataclass(frozen=True, kw_only=True)
class ConditionInputs:
    """Of B pictures; fields that are None are absent.

    Raises:
        ValueError: if the present fields disagree on B.
    """

    prompts: Sequence[str]  # B captions, classes or layouts; "" says nothing
    hint: Tensor | None = None  # [B, k, H, W], a dense picture of the same place: a map, a masked picture and its mask
    image: Tensor | None = None  # [B, 3, H, W] in [-1, 1], to be imitated; in training the picture itself
    frame: Tensor | None = None  # [B, 6] pixels: height, width of the whole, top, left, height, width of the cutout
    embedding: Tensor | None = None  # [B, d], a picture as a point, see `embedders`; takes the place of image
    dropped: Tensor | None = None  # [B] bool, who is to be told nothing, as guidance wants it; None: nobody
    names: Sequence[str] | None = None  # of B pictures of the data, which are not to be told of themselves

    def __post_init__(self) -> None:
        there = {name: getattr(self, name) for name in ("prompts", "names", *TENSORS)}
        sizes = {name: len(value) for name, value in there.items() if value is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"what is given must share its batch size, not {sizes}")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_dropped(self) -> Tensor:
        """Who is told nothing: [B] bool, on the device of what is given."""
        if self.dropped is not None:
            return self.dropped
        present = (getattr(self, name) for name in TENSORS[:-1])
        device = next((x.device for x in present if x is not None), None)
        return torch.zeros(len(self), dtype=torch.bool, device=device)

    def null(self) -> ConditionInputs:
        """The same, of members that are told nothing: what caption dropout and guidance put in place.

        Where there are only prompts these are all alike, and one stands for them.
        """
        if all(getattr(self, name) is None for name in TENSORS[:-1]):
            return ConditionInputs(prompts=[""], dropped=torch.ones(1, dtype=torch.bool))
        return replace(self, prompts=[""] * len(self), dropped=torch.ones_like(self.is_dropped))

    def cat(self, other: ConditionInputs) -> ConditionInputs:
        """Both, one after the other. Raises ValueError if a tensor is present in one and absent in the other."""
        joined: dict[str, Tensor | None] = {}
        for name in TENSORS[:-1]:
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None):
                raise ValueError(f"one has {name} and the other has none")
            joined[name] = None if a is None else torch.cat([a, b])
        dropped = torch.cat([self.is_dropped, other.is_dropped])
        names = None if self.names is None or other.names is None else [*self.names, *other.names]
        return ConditionInputs(prompts=[*self.prompts, *other.prompts], dropped=dropped, names=names, **joined)

    def select(self, members: slice) -> ConditionInputs:
        """The members of a slice."""
        names = None if self.names is None else self.names[members]
        return ConditionInputs(prompts=self.prompts[members], names=names, **self._each(lambda x: x[members]))

    def to(self, device: torch.device | str) -> ConditionInputs:
        """The same on another device."""
        return replace(self, **self._each(lambda x: x.to(device, non_blocking=True)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        present = {name: getattr(self, name) for name in TENSORS}
        return {name: None if x is None else change(x) for name, x in present.items()}
