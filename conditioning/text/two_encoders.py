"""Two text encoders with concatenated tokens, and a pooled output of the second (Podell et al. 2023, section 2.1).

A model folder stores them in text_encoder/ and text_encoder_2/, as diffusers' StableDiffusionXLPipeline does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from conditioning.encoders.clip import Clip
from conditioning.encoders.scratch import TransformerConfig
from conditioning.interface.conditioner import PromptConditioner
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.interface.tokens import PromptTokenizer, Tokens
from conditioning.text.text_conditioner import TextConditioner

SUFFIX = "_2"  # of the folders of the second encoder


@dataclass(frozen=True, kw_only=True)
class SecondEncoderConfig:
    """A second text encoder; its tokens are concatenated to those of the first. See `ConditionerConfig`."""

    kind: str = "transformers"  # transformers | open_clip | scratch
    name: str = ""  # folder or hub name of a transformers model; open_clip architecture; unused for scratch
    pretrained: str | None = None  # open_clip only: tag, file or "random"
    max_length: int | None = None  # tokens per prompt, equal to the first's; None: the encoder's limit, at most 77
    use_mask: bool | None = None  # hide padding; None: no for CLIP, yes for all others
    scratch: TransformerConfig = field(default_factory=TransformerConfig)  # scratch only: size of the transformer


class TwoTokenizers:
    """Converts prompts to the ids of both encoders, concatenated: [B, 2 L]."""

    has_positions = False

    def __init__(self, first: PromptTokenizer, second: PromptTokenizer) -> None:
        if first.max_length != second.max_length:
            raise ValueError(
                f"the two text encoders read {first.max_length} and {second.max_length} tokens, and their tokens are "
                "concatenated; set the same max_length for both"
            )
        self.both, self.max_length = (first, second), first.max_length

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask [B, 2 L] of B prompts."""
        first, second = (tokenizer(prompts) for tokenizer in self.both)
        ids, mask = torch.cat([first.ids, second.ids], dim=1), torch.cat([first.mask, second.mask], dim=1)
        return Tokens(ids=ids, mask=mask)

    def cut(self, prompt: str) -> str:
        """Return the longer of the two ends that are truncated, or "" if the prompt fits."""
        return max((tokenizer.cut(prompt) for tokenizer in self.both), key=len)

    def state_dict(self) -> dict[str, dict]:
        """Return the states of both tokenizers."""
        return {name: tokenizer.state_dict() for name, tokenizer in zip(("first", "second"), self.both, strict=True)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Restore a `state_dict`."""
        for name, tokenizer in zip(("first", "second"), self.both, strict=True):
            tokenizer.load_state_dict(state[name])


class TwoEncoders(PromptConditioner):
    """Prompts -> Context with tokens [B, L, d1 + d2] and a vector [B, p].

    The tokens of a CLIP are the inputs of its last layer, without a norm, as in SDXL; those of any other encoder are
    its outputs. The vector is the pooled output of the second encoder if that is a CLIP.

    Attributes:
        zero_empty: Whether the context of the empty prompt is zero, as in the training of SDXL.

    Raises:
        ValueError: The encoders read different numbers of tokens.
    """

    reads_text = True

    def __init__(self, first: TextConditioner, second: TextConditioner) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.tokenizer = TwoTokenizers(first.tokenizer, second.tokenizer)
        self.trainable, self.zero_empty = first.trainable or second.trainable, False
        self.max_length, self.use_mask = first.max_length, first.use_mask and second.use_mask
        if isinstance(first.encoder, Clip):  # `forward` does not read the outputs of its last layer
            first.encoder.freeze_end()

    @property
    def context_dim(self) -> int:
        """d1 + d2 of the tokens."""
        return self.first.context_dim + self.second.context_dim

    @property
    def vector_dim(self) -> int | None:
        """p of the vector; None if there is none."""
        return self.second.encoder.pooled_dim if isinstance(self.second.encoder, Clip) else None

    @property
    def components(self) -> dict[str, list[str | None]]:
        """Entries of model_index.json for the four folders: library and class."""
        second = {f"{name}{SUFFIX}": value for name, value in self.second.components.items()}
        return self.first.components | second

    def train(self, mode: bool = True) -> TwoEncoders:
        """Set training mode; frozen encoders stay in evaluation mode."""
        super().train(mode and self.trainable)
        for part in (self.first, self.second):
            part.train(mode)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask [B, 2 L] on the CPU."""
        return self.tokenizer(prompts)

    def forward(self, ids: Tensor, mask: Tensor, inputs: ConditionInputs | None = None) -> Context:
        """Return the context of ids and mask [B, 2 L], computed in one batch."""
        (one, _), (two, pooled) = (
            _encode(part, *both)
            for part, *both in zip((self.first, self.second), ids.chunk(2, 1), mask.chunk(2, 1), strict=True)
        )
        attended = mask.unflatten(1, (2, -1)).any(dim=1) if self.use_mask else None  # [B, 2 L] -> [B, L]
        context = Context(tokens=torch.cat([one, two], dim=-1), mask=attended, vector=pooled)
        if not self.zero_empty:
            return context
        has_text = (ids != self.tokenize([""]).ids.to(ids)).any(dim=1)  # [B]
        vector = None if pooled is None else pooled * has_text[:, None]
        return replace(context, tokens=context.tokens * has_text[:, None, None], vector=vector)

    def cut(self, prompt: str) -> str:
        """Return the longer of the two ends that are truncated, or "" if the prompt fits."""
        return self.tokenizer.cut(prompt)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the fingerprints of both encoders."""
        return hashlib.sha256(f"{self.first.fingerprint()} {self.second.fingerprint()}".encode()).hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write text_encoder/, tokenizer/, text_encoder_2/ and tokenizer_2/; dtype None keeps the weights' dtype."""
        self.first.save(model_folder, dtype)
        self.second.save(model_folder, dtype, SUFFIX)


def _encode(part: TextConditioner, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return tokens [B, L, d] and, for a CLIP, the pooled output [B, p] of one encoder."""
    if not isinstance(part.encoder, Clip):
        return part(ids, mask).tokens, None
    with torch.set_grad_enabled(part.trainable and torch.is_grad_enabled()):
        before, last = part.encoder.layers(ids, mask if part.use_mask else None)
        return before, part.encoder.pooled(ids, last)
