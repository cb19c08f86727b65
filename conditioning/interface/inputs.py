"""Inputs of a conditioner: the prompts of a batch, and everything else that a model may be conditioned on.

A conditioner turns `ConditionInputs` into a `Context`, which the denoiser reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ConditionInputs:
    """Inputs of B members of a batch; fields that are None are absent.

    Raises:
        ValueError: The fields differ in batch size.
    """

    prompts: Sequence[str]  # B captions, classes or layouts; "" is the empty prompt
    hint: Tensor | None = None  # [B, k, H, W] dense image aligned with the picture: a map, or an image with its mask
    image: Tensor | None = None  # [B, 3, H, W] in [-1, 1], image to vary; in training, the image itself
    frame: Tensor | None = None  # [B, 6] in pixels: image height and width, crop top, left, height and width
    embedding: Tensor | None = None  # [B, d] image embedding, used in place of `image`
    dropped: Tensor | None = None  # [B] bool, members that get the null context; None: no member does
    names: Sequence[str] | None = None  # B file names in the training data; retrieval excludes them from neighbors

    def __post_init__(self) -> None:
        sizes = {each.name: len(value) for each in fields(self) if (value := getattr(self, each.name)) is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the fields of ConditionInputs must have one batch size, not {sizes}")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def present(self) -> frozenset[str]:
        """Names of the tensors that are present, without `dropped`; an embedding counts as an image too."""
        names = frozenset(self._tensors()) - {"dropped"}
        return names | {"image"} if "embedding" in names else names

    @property
    def is_dropped(self) -> Tensor:
        """Members that get the null context: [B] bool, on the device of the other tensors."""
        if self.dropped is not None:
            return self.dropped
        device = next((x.device for x in self._tensors().values()), None)
        return torch.zeros(len(self), dtype=torch.bool, device=device)

    def null(self) -> ConditionInputs:
        """Return the same inputs with empty prompts and every member dropped, for caption dropout and guidance.

        Without tensors all members are equal, and the result has one member.
        """
        if not self.present:
            return type(self)(prompts=[""], dropped=torch.ones(1, dtype=torch.bool))
        return replace(self, prompts=[""] * len(self), dropped=torch.ones_like(self.is_dropped))

    def cat(self, other: ConditionInputs) -> ConditionInputs:
        """Concatenate two batches. Raises ValueError if a tensor is present in only one of them."""
        own, others = self._tensors(), other._tensors()
        if missing := sorted((own.keys() ^ others.keys()) - {"dropped"}):
            raise ValueError(f"one batch has {missing[0]} and the other has none; both or neither must have it")
        joined = {name: torch.cat([own[name], others[name]]) for name in own if name != "dropped"}
        joined["dropped"] = torch.cat([self.is_dropped, other.is_dropped])
        names = None if self.names is None or other.names is None else [*self.names, *other.names]
        return replace(self, prompts=[*self.prompts, *other.prompts], names=names, **joined)

    def select(self, members: slice) -> ConditionInputs:
        """Return the members that a slice selects."""
        names = None if self.names is None else self.names[members]
        return replace(self, prompts=self.prompts[members], names=names, **self._each(lambda x: x[members]))

    def to(self, device: torch.device | str) -> ConditionInputs:
        """Return the inputs on another device."""
        return replace(self, **self._each(lambda x: x.to(device, non_blocking=True)))

    def _tensors(self) -> dict[str, Tensor]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: change(value) for name, value in self._tensors().items()}
