"""Conditioner of prompts and other inputs: one reader per input, whose contexts are combined.

It combines cross-attention and concatenation, as in Rombach et al. 2022, section 3.3, and vectors that are added to the
time embedding (Dhariwal & Nichol 2021; Podell et al. 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.interface.conditioner import Conditioner, Hint, PromptConditioner
from conditioning.interface.context import Context
from conditioning.interface.input_reader import Reader
from conditioning.interface.inputs import ConditionInputs
from conditioning.interface.tokens import Tokens
from stipple_core.files.hashing import hash_weights
from stipple_core.files.json_file import write_json
from stipple_core.files.weights import write_weights

FOLDER, WEIGHTS = "conditioner", "model.safetensors"  # see `conditioning.readers.registry`


class CombinedConditioner(nn.Module):
    """A conditioner of prompts, combined with readers of other inputs. See `Conditioner` for its members.

    Args:
        prompts: Any conditioner of prompts; `Unconditional` if the model reads none.
        readers: Readers by name, a key of `conditioning.readers.registry.READERS`. Tokens, vectors and latents are
            concatenated in this order.

    Raises:
        ValueError: The tokens have different widths.
    """

    zero_empty: bool | None = None

    def __init__(self, prompts: PromptConditioner, readers: Mapping[str, Reader]) -> None:
        super().__init__()
        self.prompts, self.readers = prompts, nn.ModuleDict(readers)
        self.trainable = prompts.trainable or any(reader.trainable for reader in readers.values())
        widths = {prompts.context_dim, *(reader.widths.tokens for reader in readers.values())} - {None, 0}
        if len(widths) > 1:
            raise ValueError(f"tokens of widths {sorted(widths)} can't be concatenated; project them to one width")
        self.context_dim = next(iter(widths), None)
        self.train(self.training)

    @property
    def vector_dim(self) -> int | None:
        """v of the concatenated vectors; None if there are none."""
        return (self.prompts.vector_dim or 0) + sum(reader.widths.vector for reader in self.readers.values()) or None

    @property
    def latent_channels(self) -> int:
        """c of the concatenated latents, which are concatenated to z_t; 0 if there are none."""
        return self.prompts.latent_channels + sum(reader.widths.latents for reader in self.readers.values())

    @property
    def reads(self) -> frozenset[str]:
        """Fields of `ConditionInputs` that readers read; "map" in addition if training needs maps for the hints."""
        return self.prompts.reads.union(*(reader.reads for reader in self.readers.values()))

    @property
    def required_to_sample(self) -> frozenset[str]:
        """Subset of `reads` that is required to draw a picture; readers have a substitute for the others."""
        return self.prompts.reads.union(*(reader.reads - reader.optional for reader in self.readers.values()))

    @property
    def hint(self) -> Hint | None:
        """Makes the hints of training images, see `conditioning.hints.hints`; None if no reader reads hints."""
        return next((reader.hint for reader in self.readers.values() if "hint" in reader.reads), None)

    @property
    def has_positions(self) -> bool:
        """Whether prompts describe where objects are."""
        return self.prompts.has_positions

    @property
    def reads_text(self) -> bool:
        """Whether prompts are text for the conditioner of prompts or for a reader."""
        return self.prompts.reads_text or self._reader_reads_prompts

    @property
    def max_length(self) -> int:
        """L of the ids [B, L] of prompts."""
        return self.prompts.max_length

    @property
    def use_mask(self) -> bool:
        """Whether the padding of prompts is hidden."""
        return self.prompts.use_mask

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the prompts."""
        return self.prompts.tokenizer

    @property
    def components(self) -> Mapping[str, list[str | None]]:
        """Entries of model_index.json for the encoder of prompts."""
        return self.prompts.components

    def train(self, mode: bool = True) -> CombinedConditioner:
        """Set training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in (self.prompts, *self.readers.values()):
            part.train(mode and part.trainable)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask [B, L] on the CPU."""
        return self.prompts.tokenize(self._encoder_prompts(prompts))

    def forward(self, ids: Tensor, mask: Tensor, inputs: ConditionInputs) -> Context:
        """Return the context of B members: prompts as ids and mask [B, L], and other inputs, on one device.

        If there are 2 B prompts, the second half belongs to `inputs.null()`. Each distinct row of ids is encoded once:
        half of them are empty prompts if both contexts of guidance are made together.
        """
        distinct, place = torch.unique(ids, dim=0, return_inverse=True) if ids.shape[1] else (ids, None)
        if place is None or len(distinct) == len(ids):
            context = self.prompts(ids, mask)
        else:
            first = torch.full((len(distinct),), len(ids), device=ids.device)
            first = first.scatter_reduce(0, place, torch.arange(len(ids), device=ids.device), "amin")
            context = self.prompts(ids[first], mask[first]).select(place)
        if len(ids) == len(inputs):
            return joined([context, *(reader(inputs) for reader in self.readers.values())])
        return joined([context, *(_with_null(reader, inputs) for reader in self.readers.values())])

    def encode(self, prompts: Sequence[str], inputs: ConditionInputs | None = None) -> Context:
        """Return the context of B prompts and of the other inputs, on the device of the weights.

        Raises:
            ValueError: An input that a reader requires is missing.
        """
        inputs = ConditionInputs(prompts=prompts) if inputs is None else inputs
        if missing := sorted(self.required_to_sample - inputs.present - {"map"}):
            raise ValueError(f"this model requires {missing[0]} besides prompts, and it is missing; add it")
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        context = self.prompts.encode(self._encoder_prompts(prompts))
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return joined([context, *(reader(inputs.to(device)) for reader in self.readers.values())])

    def null(self, batch: int = 1) -> Context:
        """Return the context of the empty prompt, without readers."""
        return self.prompts.null(batch)

    def cut(self, prompt: str) -> str:
        """Return the end of the prompt that exceeds `max_length`, or "" if the prompt fits."""
        return self.prompts.cut(*self._encoder_prompts([prompt]))

    def bind_encoder(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Set the function images [B, 3, H, W] -> latents [B, c, h, w] of all readers that use it."""
        for reader in self.readers.values():
            reader.bind_encoder(encode)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the fingerprint of the conditioner of prompts, and config and weights of readers."""
        digest = hashlib.sha256(self.prompts.fingerprint().encode())
        for name, reader in self.readers.items():
            digest.update(f"{name} {reader.config}".encode())
            hash_weights(digest, reader.state_dict())
        return digest.hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folders of the prompts and conditioner/ into a model folder; None keeps the weights' dtype."""
        self.prompts.save(model_folder, dtype)
        save_readers(self.readers, model_folder, dtype)

    @property
    def _reader_reads_prompts(self) -> bool:
        return any(reader.reads_prompts for reader in self.readers.values())

    def _encoder_prompts(self, prompts: Sequence[str]) -> Sequence[str]:
        """Return the prompts of the inner conditioner: empty ones if it reads none, but a reader does."""
        unread = self.prompts.context_dim is None and self.prompts.vector_dim is None
        return [""] * len(prompts) if unread and self._reader_reads_prompts else prompts


def save_readers(readers: Mapping[str, Reader], model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write conditioner/ into a model folder; dtype None keeps the dtype of the weights."""
    folder = Path(model_folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{name}.{key}": weight.to(dtype if weight.is_floating_point() else None)
        for name, reader in readers.items()
        for key, weight in reader.state_dict().items()
    }
    if weights:
        write_weights(weights, folder / WEIGHTS)
    write_json({name: asdict(reader.config) for name, reader in readers.items()}, folder / "config.json")


def files_of(conditioner: Conditioner) -> list[Path]:
    """Open the data files of all readers, such as databases, and return their paths. Raises OSError or ValueError."""
    return [path for reader in conditioner.readers.values() for path in reader.open_files()]


def joined(contexts: Iterable[Context]) -> Context:
    """Combine contexts of the same B members: tokens along the sequence, vectors and latents along their channels."""
    contexts = list(contexts)
    with_tokens = [each for each in contexts if each.tokens is not None]
    mask = None
    if any(each.mask is not None for each in with_tokens):
        mask = torch.cat([_mask(each) for each in with_tokens], dim=1)
    return Context(
        tokens=_concatenated(with_tokens, "tokens"),  # [B, L1 + L2 + ..., d]
        mask=mask,  # [B, L1 + L2 + ...]
        vector=_concatenated(contexts, "vector"),  # [B, v1 + v2 + ...]
        latents=_concatenated(contexts, "latents"),  # [B, c1 + c2 + ..., h, w]
    )


def _with_null(reader: Reader, inputs: ConditionInputs) -> Context:
    """Return the context [2 B] of the inputs and of `inputs.null()`; it is computed once if both are equal."""
    if reader.survives_dropout:
        context = reader(inputs)
        return context.cat(context)
    return reader(inputs.cat(inputs.null()))


def _mask(context: Context) -> Tensor:
    if context.mask is not None:
        return context.mask
    return torch.ones(context.tokens.shape[:2], dtype=torch.bool, device=context.tokens.device)


def _concatenated(contexts: Iterable[Context], name: str) -> Tensor | None:
    present = [value for each in contexts if (value := getattr(each, name)) is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat(present, dim=1)
