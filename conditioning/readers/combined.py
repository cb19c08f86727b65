"""A conditioner that reads more than prompts: a reader for each thing that is given, their contexts put together.

The paper's two ways of conditioning, cross-attention and concatenation, at once (Rombach et al. 2022, section 3.3), and
vectors that are added to the time embedding (Dhariwal & Nichol 2021; Podell et al. 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.tokenizers.tokenizer import Tokens


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What a reader adds to what a UNet is built for; 0 is nothing."""

    tokens: int = 0  # d of its tokens [B, L, d], which must be that of the prompts' tokens
    vector: int = 0  # v of its vector [B, v], beside those of others
    latents: int = 0  # c of its latents [B, c, h, w], beside those of others


class Reader(Protocol):
    """One thing that a model reads besides prompts: an nn.Module, `ConditionInputs` -> Context."""

    reads: frozenset[str]  # which of "hint", "image", "frame" it reads; "map": its hint is made of one in training
    config: Any  # a frozen dataclass, written as JSON beside the weights
    widths: Widths
    trainable: bool  # learns with the UNet
    kept: bool  # says of those that are dropped what it says of others; absent: no

    def __call__(self, given: ConditionInputs) -> Context:
        """What it says of B pictures; of those that are dropped, what stands for nothing."""


class CombinedConditioner(nn.Module):
    """A conditioner of prompts with readers beside it; has the public members of `Conditioner`.

    Args:
        prompts: any of the conditioners of prompts; `Unconditional` where there are none.
        readers: by name, a key of `conditioning.readers.registry.READERS`; tokens, vectors, latents are joined in this order.

    Raises:
        ValueError: tokens of several widths can't be read together.
    """

    def __init__(self, prompts: nn.Module, readers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.prompts, self.readers = prompts, nn.ModuleDict(readers)
        self.trainable = prompts.trainable or any(reader.trainable for reader in readers.values())
        widths = {prompts.context_dim, *(reader.widths.tokens for reader in readers.values())} - {None, 0}
        if len(widths) > 1:
            raise ValueError(f"tokens of widths {sorted(widths)} can't be read together; project them to one")
        self.context_dim = next(iter(widths), None)
        self.train(self.training)

    @property
    def vector_dim(self) -> int | None:
        """v of the vectors, side by side; None: there is none."""
        return (self.prompts.vector_dim or 0) + sum(reader.widths.vector for reader in self.readers.values()) or None

    @property
    def latent_channels(self) -> int:
        """c of the latents, side by side, that are concatenated to z_t."""
        return self.prompts.latent_channels + sum(reader.widths.latents for reader in self.readers.values())

    @property
    def reads(self) -> frozenset[str]:
        """Which of "hint", "image", "frame" have to be given; "map": training needs one to make the hint of."""
        return self.prompts.reads.union(*(reader.reads for reader in self.readers.values()))

    @property
    def required_to_sample(self) -> frozenset[str]:
        """Which of these have to be given for a picture to be drawn: some readers know another way then."""
        spared = {name: getattr(reader, "optional", frozenset()) for name, reader in self.readers.items()}
        return self.prompts.reads.union(*(reader.reads - spared[name] for name, reader in self.readers.items()))

    @property
    def hint(self) -> Callable[[Tensor, Tensor | None, torch.Generator], Tensor] | None:
        """Makes the hint of a picture in training, see `stipple_core.data.dataset.ImageDataset`; None: none is read."""
        return next((reader.hint for reader in self.readers.values() if "hint" in reader.reads), None)

    @property
    def has_positions(self) -> bool:
        """Whether prompts say where things are."""
        return self.prompts.has_positions

    @property
    def reads_text(self) -> bool:
        """Whether prompts are text to the conditioner of prompts or to a reader."""
        return self.prompts.reads_text or any(getattr(each, "reads_prompts", False) for each in self.readers.values())

    @property
    def max_length(self) -> int:
        """L of the prompts' tokens [B, L, d]."""
        return self.prompts.max_length

    @property
    def use_mask(self) -> bool:
        """Whether the prompts' padding is hidden."""
        return self.prompts.use_mask

    @property
    def tokenizer(self) -> Any:
        """That of the prompts."""
        return self.prompts.tokenizer

    @property
    def components(self) -> dict[str, list[str | None]]:
        """What model_index.json says of the prompts' encoder."""
        return self.prompts.components

    def train(self, mode: bool = True) -> CombinedConditioner:
        """Training mode, which what is frozen never enters."""
        super().train(mode)
        for part in (self.prompts, *self.readers.values()):
            part.train(mode and part.trainable)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask [B, L] on the CPU."""
        return self.prompts.tokenize(self._seen(prompts))

    def forward(self, ids: Tensor, mask: Tensor, given: ConditionInputs) -> Context:
        """Context of B members: prompts as ids and mask [B, L], and the rest as it is given, all on one device.

        Where there are more prompts than members given, the rest are of the same members, dropped: `given.null()`.
        Each distinct row of ids is encoded once: half of them are empty prompts where both contexts of guidance are
        made together.
        """
        distinct, place = torch.unique(ids, dim=0, return_inverse=True) if ids.shape[1] else (ids, None)
        if place is None or len(distinct) == len(ids):
            read = self.prompts(ids, mask)
        else:
            first = torch.full((len(distinct),), len(ids), device=ids.device)
            first = first.scatter_reduce(0, place, torch.arange(len(ids), device=ids.device), "amin")
            read = self.prompts(ids[first], mask[first]).select(place)
        if len(ids) == len(given):
            return joined([read, *(reader(given) for reader in self.readers.values())])
        return joined([read, *(_twice(reader, given) for reader in self.readers.values())])

    def encode(self, prompts: Sequence[str], given: ConditionInputs | None = None) -> Context:
        """Context of B prompts and what is given besides, on the networks' device.

        Raises:
            ValueError: something that a reader needs is not given.
        """
        given = ConditionInputs(prompts=prompts) if given is None else given
        there = {name for name in ("hint", "image", "frame") if getattr(given, name) is not None}
        there |= {"map"} if given.embedding is None else {"map", "image"}
        if absent := sorted(self.required_to_sample - there):
            raise ValueError(f"this model reads prompts and {absent[0]}, which is not given; give it")
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        read = self.prompts.encode(self._seen(prompts))
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return joined([read, *(reader(given.to(device)) for reader in self.readers.values())])

    def null(self, batch: int = 1) -> Context:
        """What the prompts' conditioner says of the empty prompt."""
        return self.prompts.null(batch)

    def cut(self, prompt: str) -> str:
        """The end of a prompt that does not fit."""
        return self.prompts.cut(*self._seen([prompt]))

    def _seen(self, prompts: Sequence[str]) -> Sequence[str]:
        """Prompts as their own conditioner is given them: empty where it reads none, and a reader does."""
        read = any(getattr(reader, "reads_prompts", False) for reader in self.readers.values())
        silent = self.prompts.context_dim is None and self.prompts.vector_dim is None
        return [""] * len(prompts) if read and silent else prompts

    def fingerprint(self) -> str:
        """sha256 over all parts."""
        digest = hashlib.sha256(self.prompts.fingerprint().encode())
        for name, reader in self.readers.items():
            digest.update(f"{name} {reader.config}".encode())
            for key, weight in sorted(reader.state_dict().items()):
                digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the prompts' folders and conditioner/ into a model folder; dtype None keeps the weights' own."""
        from conditioning.readers.registry import save_readers  # which knows all kinds, and so this module

        self.prompts.save(model_folder, dtype)
        save_readers(self.readers, model_folder, dtype)


def files_of(conditioner: Any) -> list[Path]:
    """The files in which a conditioner's readers look things up, opened. Raises FileNotFoundError or ValueError."""
    return [reader.open() for reader in conditioner.readers.values() if hasattr(reader, "open")]


def joined(contexts: Iterable[Context]) -> Context:
    """Contexts of the same B members as one: tokens one after another, vectors and latents side by side."""
    contexts = list(contexts)
    with_tokens = [each for each in contexts if each.tokens is not None]
    mask = None
    if any(each.mask is not None for each in with_tokens):
        mask = torch.cat([_mask(each) for each in with_tokens], dim=1)
    return Context(
        tokens=_side_by_side(with_tokens, "tokens"),  # [B, L1 + L2 + ..., d]
        mask=mask,  # [B, L1 + L2 + ...]
        vector=_side_by_side(contexts, "vector"),  # [B, v1 + v2 + ...]
        latents=_side_by_side(contexts, "latents"),  # [B, c1 + c2 + ..., h, w]
    )


def _twice(reader: Reader, given: ConditionInputs) -> Context:
    """What a reader says of B members, and then of the same ones dropped; where that is the same it is asked once."""
    if getattr(reader, "kept", False):
        once = reader(given)
        return once.cat(once)
    return reader(given.cat(given.null()))


def _mask(context: Context) -> Tensor:
    if context.mask is not None:
        return context.mask
    return torch.ones(context.tokens.shape[:2], dtype=torch.bool, device=context.tokens.device)


def _side_by_side(contexts: Iterable[Context], name: str) -> Tensor | None:
    present = [value for each in contexts if (value := getattr(each, name)) is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat(present, dim=1)
