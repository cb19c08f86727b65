"""Interface of all conditioners: tau_theta in Rombach et al. 2022, section 3.3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conditioning.interface.context import Context, concatenate
from conditioning.interface.input_reader import Reader
from conditioning.interface.inputs import ConditionInputs
from conditioning.interface.tokens import Tokens

Hint = Callable[[Tensor, Tensor | None, torch.Generator], Tensor]


class Conditioner(Protocol):
    """An `nn.Module` that turns prompts, and other inputs of a model, into a `Context`.

    Conditioners that read only prompts inherit `PromptConditioner`. `CombinedConditioner` combines one of them with
    readers of other inputs.
    """

    @property
    def prompts(self) -> Conditioner:
        """The conditioner of the prompts: itself, or the one inside a `CombinedConditioner`."""

    @property
    def readers(self) -> Mapping[str, Reader]:
        """Readers of the other inputs by name, a key of `conditioning.readers.registry.READERS`."""

    @property
    def trainable(self) -> bool:
        """Whether any part is trained together with the UNet."""

    @property
    def tokenizer(self) -> Any:
        """Converts prompts to ids; has `state_dict` and `load_state_dict`. None if the model is unconditional."""

    @property
    def max_length(self) -> int:
        """L of the ids [B, L] of prompts."""

    @property
    def use_mask(self) -> bool:
        """Whether padding is hidden from the text encoder and from the UNet."""

    @property
    def context_dim(self) -> int | None:
        """d of the tokens [B, L, d] of a context; None if it has no tokens."""

    @property
    def vector_dim(self) -> int | None:
        """v of the vector [B, v] of a context; None if it has no vector."""

    @property
    def latent_channels(self) -> int:
        """c of the latents [B, c, h, w] of a context, which are concatenated to z_t; 0 if it has no latents."""

    @property
    def reads(self) -> frozenset[str]:
        """Fields of `ConditionInputs` that are read besides the prompts.

        Contains "map" if training needs maps to make the hints.
        """

    @property
    def required_to_sample(self) -> frozenset[str]:
        """Subset of `reads` that is required to draw a picture; readers may have a substitute for the others."""

    @property
    def reads_text(self) -> bool:
        """Whether prompts are text, not classes or layouts."""

    @property
    def has_positions(self) -> bool:
        """Whether prompts describe where objects are, so images must not be flipped or cropped at random."""

    @property
    def hint(self) -> Hint | None:
        """Makes the hint of a training image, see `conditioning.hints.hints`; None if the model reads no hints."""

    @property
    def zero_empty(self) -> bool | None:
        """Whether the context of the empty prompt is zero (SDXL); None if the conditioner has no such option."""

    @property
    def components(self) -> dict[str, list[str | None]]:
        """Entries of model_index.json: library and class of each folder, [None, None] if no library has one."""

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask [B, L] on the CPU. Raises ValueError for a prompt that the model cannot read."""

    def __call__(self, ids: Tensor, mask: Tensor, inputs: ConditionInputs | None = None) -> Context:
        """Return the context of B prompts, computed in one batch; DistributedDataParallel wraps this method."""

    def encode(self, prompts: Sequence[str], inputs: ConditionInputs | None = None) -> Context:
        """Return the context of B prompts and of the other inputs, on the device of the weights."""

    def null(self, batch: int = 1) -> Context:
        """Return the context of the empty prompt, which caption dropout and guidance use in place of a prompt."""

    def cut(self, prompt: str) -> str:
        """Return the end of the prompt that exceeds `max_length`, or "" if the prompt fits."""

    def bind_encoder(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Set the function images [B, 3, H, W] -> latents [B, c, h, w] that readers of images use."""

    def fingerprint(self) -> str:
        """Return a SHA-256 over weights, tokenizer and options; contexts with different fingerprints do not mix."""

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write all files into a model folder; dtype None keeps the dtype of the weights."""


class PromptConditioner(nn.Module):
    """Base class of conditioners that read only prompts: the defaults of `Conditioner`, and `encode`.

    Subclasses define `forward`, `tokenize`, `fingerprint`, `save`, and the members that differ from the defaults.
    """

    readers: Mapping[str, Reader] = {}
    reads: frozenset[str] = frozenset()
    required_to_sample: frozenset[str] = frozenset()
    hint: Hint | None = None
    latent_channels = 0
    vector_dim: int | None = None
    use_mask = has_positions = reads_text = False
    zero_empty: bool | None = None
    components: Mapping[str, list[str | None]] = {"text_encoder": [None, None], "tokenizer": [None, None]}

    @property
    def prompts(self) -> PromptConditioner:
        """The conditioner itself."""
        return self

    def encode(self, prompts: Sequence[str], inputs: ConditionInputs | None = None) -> Context:
        """Return the context of B prompts, on the device of the weights.

        Without gradients, each distinct prompt is encoded in a batch of one: the last bits of a matrix product may
        depend on its number of rows, and the context of a prompt must not depend on other prompts. If throughput
        matters more, call `tokenize` and `forward`.

        Raises:
            ValueError: There are no prompts, or the model cannot read one of them.
        """
        if not prompts:
            raise ValueError("prompts is empty; pass at least one prompt")
        device, tokens = next(self.parameters()).device, self.tokenize(prompts)
        ids, mask = tokens.ids.to(device), tokens.mask.to(device)
        if self.trainable and torch.is_grad_enabled():
            return self(ids, mask)
        first = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
        distinct = {prompt: self(ids[i : i + 1], mask[i : i + 1]) for prompt, i in first.items()}
        return concatenate([distinct[prompt] for prompt in prompts])

    def null(self, batch: int = 1) -> Context:
        """Return the context of the empty prompt; raises ValueError if the model has no null class."""
        return self.encode([""]).repeat(batch)

    def cut(self, prompt: str) -> str:
        """Return "": prompts of this kind always fit."""
        return ""

    def bind_encoder(self, encode: Callable[[Tensor], Tensor]) -> None:
        """Do nothing: a conditioner of prompts reads no images."""
