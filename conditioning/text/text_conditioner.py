"""The conditioner tau_theta (Rombach et al. 2022, section 3.3): tokenizer + text encoder, prompts to context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.layouts.layout_tokenizer import LayoutTokenizer
from conditioning.tokenizers.tokenizer import Tokenizer, Tokens
from stipple_core.files.weights import write_weights

if TYPE_CHECKING:
    from conditioning.build import AnyConditioner

LIBRARIES = {"LDMBertModel": "latent_diffusion", "BoxEncoder": None}  # of model_index.json; None: nobody else has it


class Conditioner(nn.Module):
    """Prompts -> Context with tokens [B, L, d]; frozen unless trainable.

    Args:
        tokenizer: text to ids of one length L, so that nothing depends on the other prompts of a batch.
        encoder: (ids, mask) [B, L] -> tokens [B, L, d] (of layouts there may be fewer), with .config and .weights().
        use_mask: hides padding from the encoder and, by context.mask, from the UNet.
        trainable: lets gradients through and obeys train(); otherwise no_grad and eval mode for good.

    Attributes:
        needs, asks, readers, hint, vector_dim, latent_channels: what `CombinedConditioner` has besides prompts, and this has not.
        zero_empty: see `TwoEncoders`; None: the choice is of those alone.
    """

    reads, required_to_sample, readers, hint, vector_dim, latent_channels = frozenset(), frozenset(), {}, None, None, 0
    zero_empty = None

    def __init__(
        self, tokenizer: Tokenizer | LayoutTokenizer, encoder: nn.Module, use_mask: bool, trainable: bool = False
    ) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.use_mask, self.trainable = tokenizer, encoder, use_mask, trainable
        self.requires_grad_(trainable)
        self.train(trainable)

    @property
    def prompts(self) -> Conditioner:
        """What reads prompts: itself."""
        return self

    @property
    def context_dim(self) -> int:
        """d of the tokens [B, L, d]."""
        return _width(self.encoder.config)

    @property
    def max_length(self) -> int:
        """L of the ids [B, L], and of the tokens where each id becomes one."""
        return self.tokenizer.max_length

    @property
    def has_positions(self) -> bool:
        """Whether prompts say where things are, so that a picture must not be mirrored or cut at random."""
        return isinstance(self.tokenizer, LayoutTokenizer)

    @property
    def reads_text(self) -> bool:
        """Whether prompts are text."""
        return not self.has_positions

    @property
    def components(self) -> dict[str, list[str | None]]:
        """What model_index.json says of text_encoder/ and tokenizer/: library and class."""
        encoder = (self.encoder.config.get("architectures") or ["AutoModel"])[0]
        library = LIBRARIES.get(encoder, "transformers")
        tokenizer = self.tokenizer.options.get("tokenizer_class", "AutoTokenizer")
        return {"text_encoder": [library, encoder], "tokenizer": ["transformers", tokenizer]}

    def train(self, mode: bool = True) -> Conditioner:
        """Training mode, which a conditioner never enters of which all or a part is frozen."""
        return super().train(mode and all(p.requires_grad for p in self.parameters()))

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask [B, L] on the CPU; the end of a prompt that is too long is cut off (see `cut`)."""
        return self.tokenizer(prompts)

    def forward(self, ids: Tensor, mask: Tensor, given: ConditionInputs | None = None) -> Context:
        """Context of ids and mask [B, L], in one batch; this is what DistributedDataParallel wraps."""
        attended = mask if self.use_mask else None
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return Context(tokens=self.encoder(ids, attended), mask=attended)  # [B, L] -> [B, L, d]

    def encode(self, prompts: Sequence[str], given: ConditionInputs | None = None) -> Context:
        """Context [B, L, d] of B prompts, on the encoder's device.

        Without gradients, distinct prompts are taken one at a time: a matrix product's last bits may depend on its
        number of rows, and so a prompt's context on its batch. Where throughput counts more: tokenize and forward.
        """
        if not prompts:
            raise ValueError("there are no prompts to encode")
        device = next(self.encoder.parameters()).device
        tokens = self.tokenize(prompts)
        ids, mask = tokens.ids.to(device), tokens.mask.to(device)
        if self.trainable and torch.is_grad_enabled():
            return self(ids, mask)
        first = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
        distinct = {prompt: self(ids[i : i + 1], mask[i : i + 1]).tokens for prompt, i in first.items()}
        return Context(tokens=torch.cat([distinct[p] for p in prompts]), mask=mask if self.use_mask else None)

    def null(self, batch: int = 1) -> Context:
        """The context of the empty prompt: what caption dropout and guidance put in place of a caption."""
        return self.encode([""]).repeat(batch)

    def cut(self, prompt: str) -> str:
        """The end of the prompt that does not fit into max_length tokens; "" where all of it does."""
        return self.tokenizer.cut(prompt)

    def fingerprint(self) -> str:
        """sha256 over weights, tokenizer and options: contexts made under another one are not to be mixed with ours."""
        digest = hashlib.sha256(self.tokenizer.fingerprint())
        options = {"use_mask": self.use_mask, **self.encoder.config}
        options.pop("transformers_version", None)  # a newer library does not make another encoder
        digest.update(json.dumps(options, sort_keys=True, default=str).encode())
        for name, weight in sorted(self.encoder.weights().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None, suffix: str = "") -> None:
        """Writes text_encoder/ and tokenizer/ into a model folder; dtype None keeps the weights' own.

        Args:
            suffix: of both folders' names: "_2" for the second of two encoders, as in diffusers.
        """
        folder = Path(model_folder) / f"text_encoder{suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        floats = {name: weight.is_floating_point() for name, weight in self.encoder.weights().items()}
        weights = {name: w.to(dtype if floats[name] else None) for name, w in self.encoder.weights().items()}
        write_weights(weights, folder / "model.safetensors")
        stored = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
        config = {key: value for key, value in self.encoder.config.items() if key != "torch_dtype"}
        config |= {"dtype": str(stored).removeprefix("torch."), "use_attention_mask": self.use_mask}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        self.tokenizer.save(Path(model_folder) / f"tokenizer{suffix}")

    @staticmethod
    def load(
        model_folder: str | Path,
        dtype: torch.dtype | None = None,
        trainable: bool = False,
        variant: str | None = None,
    ) -> AnyConditioner:
        """The conditioner of a model folder, of whatever kind it is: see `load_conditioner`."""
        from conditioning.build import load_conditioner  # which knows all kinds, and so this module

        return load_conditioner(model_folder, dtype, trainable, variant)


def _width(config: dict[str, Any]) -> int:
    return config.get("hidden_size") or config["d_model"]
