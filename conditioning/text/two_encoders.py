"""Two text encoders side by side, and a pooled output of the second (Podell et al. 2023, section 2.1).

In a model folder they are text_encoder/ and text_encoder_2/, as in those of diffusers' StableDiffusionXLPipeline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from conditioning.encoders.clip import Clip
from conditioning.encoders.scratch import TransformerConfig
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.text.text_conditioner import Conditioner
from conditioning.tokenizers.tokenizer import Tokens

SUFFIX = "_2"  # of the second encoder's folders


@dataclass(frozen=True, kw_only=True)
class SecondEncoderConfig:
    """A second text encoder, whose tokens lie beside the first's; the options are those of the first."""

    kind: str = "transformers"  # transformers | open_clip | scratch
    name: str = ""  # folder or hub name of a transformers model; open_clip architecture; unused for scratch
    pretrained: str | None = None  # open_clip only: tag, file or "random"
    max_length: int | None = None  # tokens per prompt, as many as the first's; None: the encoder's own, at most 77
    use_mask: bool | None = None  # hide padding; None: no for CLIP, yes for all others
    scratch: TransformerConfig = field(default_factory=TransformerConfig)  # scratch only: size of the transformer


class TwoTokenizers:
    """Prompts to the ids of both encoders, one after the other: [B, 2 L]."""

    def __init__(self, first: object, second: object) -> None:
        if first.max_length != second.max_length:
            raise ValueError(
                f"the text encoders read {first.max_length} and {second.max_length} tokens; "
                "give both the same max_length, as their tokens lie side by side"
            )
        self.both, self.max_length = (first, second), first.max_length

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask [B, 2 L] of B prompts."""
        first, second = (tokenizer(prompts) for tokenizer in self.both)
        ids, mask = torch.cat([first.ids, second.ids], dim=1), torch.cat([first.mask, second.mask], dim=1)
        return Tokens(ids=ids, mask=mask)

    def cut(self, prompt: str) -> str:
        """The longer of the ends that do not fit; "" where all of the prompt does."""
        return max((tokenizer.cut(prompt) for tokenizer in self.both), key=len)

    def state_dict(self) -> dict[str, dict]:
        """Those of both."""
        return {name: tokenizer.state_dict() for name, tokenizer in zip(("first", "second"), self.both, strict=True)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Take back a `state_dict`."""
        for name, tokenizer in zip(("first", "second"), self.both, strict=True):
            tokenizer.load_state_dict(state[name])


class TwoEncoders(nn.Module):
    """Prompts -> Context with tokens [B, L, d1 + d2] and a vector [B, p]; has the public members of `Conditioner`.

    Of a CLIP beside another encoder the tokens are what goes into its last layer, with no norm, as in SDXL; of any
    other, what it says last. The vector is the pooled output of the second, where that is a CLIP.

    Attributes:
        zero_empty: of the empty prompt all is zero, as SDXL was trained.

    Raises:
        ValueError: the two have not the same number of tokens.
    """

    latent_channels, hint, reads, readers, has_positions, reads_text = 0, None, frozenset(), {}, False, True

    def __init__(self, first: Conditioner, second: Conditioner) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.tokenizer = TwoTokenizers(first.tokenizer, second.tokenizer)
        self.trainable, self.zero_empty = first.trainable or second.trainable, False
        self.max_length, self.use_mask = first.max_length, first.use_mask and second.use_mask
        if isinstance(first.encoder, Clip):  # of which `forward` reads what goes into the last layer
            first.encoder.freeze_end()

    @property
    def prompts(self) -> TwoEncoders:
        """What reads prompts: itself."""
        return self

    @property
    def context_dim(self) -> int:
        """d1 + d2 of the tokens."""
        return self.first.context_dim + self.second.context_dim

    @property
    def vector_dim(self) -> int | None:
        """p of the vector; None: there is none."""
        return self.second.encoder.pooled_dim if isinstance(self.second.encoder, Clip) else None

    @property
    def components(self) -> dict[str, list[str | None]]:
        """What model_index.json says of the four folders."""
        second = {f"{name}{SUFFIX}": value for name, value in self.second.components.items()}
        return self.first.components | second

    def train(self, mode: bool = True) -> TwoEncoders:
        """Training mode, which a frozen encoder never enters."""
        super().train(mode and self.trainable)
        for part in (self.first, self.second):
            part.train(mode)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask [B, 2 L] on the CPU."""
        return self.tokenizer(prompts)

    def forward(self, ids: Tensor, mask: Tensor, given: ConditionInputs | None = None) -> Context:
        """Context of ids and mask [B, 2 L], in one batch."""
        (one, _), (two, pooled) = (
            _read(part, *both)
            for part, *both in zip((self.first, self.second), ids.chunk(2, 1), mask.chunk(2, 1), strict=True)
        )
        attended = mask.unflatten(1, (2, -1)).any(dim=1) if self.use_mask else None  # [B, 2 L] -> [B, L]
        context = Context(tokens=torch.cat([one, two], dim=-1), mask=attended, vector=pooled)
        if not self.zero_empty:
            return context
        said = (ids != self.tokenize([""]).ids.to(ids)).any(dim=1)  # [B]
        vector = None if pooled is None else pooled * said[:, None]
        return replace(context, tokens=context.tokens * said[:, None, None], vector=vector)

    def encode(self, prompts: Sequence[str], given: ConditionInputs | None = None) -> Context:
        """Context of B prompts, on the encoders' device; without gradients one at a time, as `Conditioner` does."""
        if not prompts:
            raise ValueError("there are no prompts to encode")
        device, tokens = next(self.parameters()).device, self.tokenize(prompts)
        ids, mask = tokens.ids.to(device), tokens.mask.to(device)
        if self.trainable and torch.is_grad_enabled():
            return self(ids, mask)
        first = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
        read = {prompt: self(ids[i : i + 1], mask[i : i + 1]) for prompt, i in first.items()}
        whole = read[prompts[0]]
        for prompt in prompts[1:]:
            whole = whole.cat(read[prompt])
        return whole

    def null(self, batch: int = 1) -> Context:
        """The context of the empty prompt."""
        return self.encode([""]).repeat(batch)

    def cut(self, prompt: str) -> str:
        """The end of the prompt that does not fit into either encoder."""
        return self.tokenizer.cut(prompt)

    def fingerprint(self) -> str:
        """sha256 over both."""
        return hashlib.sha256(f"{self.first.fingerprint()} {self.second.fingerprint()}".encode()).hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes text_encoder/, tokenizer/, text_encoder_2/ and tokenizer_2/; dtype None keeps the weights' own."""
        self.first.save(model_folder, dtype)
        self.second.save(model_folder, dtype, SUFFIX)


def _read(part: Conditioner, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, L, d] and pooled output [B, p] of one encoder."""
    if not isinstance(part.encoder, Clip):
        return part(ids, mask).tokens, None
    with torch.set_grad_enabled(part.trainable and torch.is_grad_enabled()):
        before, last = part.encoder.layers(ids, mask if part.use_mask else None)
        return before, part.encoder.pooled(ids, last)
