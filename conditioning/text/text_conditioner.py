"""Conditioner of prompts that are text or layouts: a tokenizer and an encoder (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.interface.conditioner import PromptConditioner
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.interface.tokens import PromptTokenizer, Tokens
from stipple_core.files.hashing import hash_weights
from stipple_core.files.weights import write_weights

LIBRARIES = {"LDMBertModel": "latent_diffusion", "BoxEncoder": None}  # in model_index.json; None: only Stipple has it


class TextConditioner(PromptConditioner):
    """Prompts -> Context with tokens [B, L, d]; frozen unless `trainable`.

    Args:
        tokenizer: Converts prompts to ids of one length L, so that no context depends on other prompts of a batch.
        encoder: (ids, mask) [B, L] -> tokens [B, L, d] (fewer tokens for layouts); has `config` and `weights()`.
        use_mask: Whether to hide padding from the encoder and, by `Context.mask`, from the UNet.
        trainable: Whether gradients are computed and `train()` has an effect; if not, the encoder stays in
            evaluation mode and runs under `no_grad`.
    """

    def __init__(self, tokenizer: PromptTokenizer, encoder: nn.Module, use_mask: bool, trainable: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.use_mask, self.trainable = tokenizer, encoder, use_mask, trainable
        self.requires_grad_(trainable)
        self.train(trainable)

    @property
    def context_dim(self) -> int:
        """d of the tokens [B, L, d]."""
        return _width(self.encoder.config)

    @property
    def max_length(self) -> int:
        """L of the ids [B, L], and of the tokens unless the encoder merges ids."""
        return self.tokenizer.max_length

    @property
    def has_positions(self) -> bool:
        """Whether prompts are layouts, so images must not be flipped or cropped at random."""
        return self.tokenizer.has_positions

    @property
    def reads_text(self) -> bool:
        """Whether prompts are text."""
        return not self.has_positions

    @property
    def components(self) -> dict[str, list[str | None]]:
        """Entries of model_index.json for text_encoder/ and tokenizer/: library and class."""
        encoder = (self.encoder.config.get("architectures") or ["AutoModel"])[0]
        library = LIBRARIES.get(encoder, "transformers")
        tokenizer = self.tokenizer.options.get("tokenizer_class", "AutoTokenizer")
        return {"text_encoder": [library, encoder], "tokenizer": ["transformers", tokenizer]}

    def train(self, mode: bool = True) -> TextConditioner:
        """Set training mode if all parameters require gradients, else evaluation mode."""
        return super().train(mode and all(p.requires_grad for p in self.parameters()))

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask [B, L] on the CPU; prompts that are too long are truncated, see `cut`."""
        return self.tokenizer(prompts)

    def forward(self, ids: Tensor, mask: Tensor, inputs: ConditionInputs | None = None) -> Context:
        """Return the context of ids and mask [B, L], computed in one batch."""
        attended = mask if self.use_mask else None
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return Context(tokens=self.encoder(ids, attended), mask=attended)  # [B, L] -> [B, L, d]

    def cut(self, prompt: str) -> str:
        """Return the end of the prompt that exceeds `max_length` tokens, or "" if the prompt fits."""
        return self.tokenizer.cut(prompt)

    def fingerprint(self) -> str:
        """Return a SHA-256 over weights, tokenizer and options."""
        digest = hashlib.sha256(self.tokenizer.fingerprint())
        options = {"use_mask": self.use_mask, **self.encoder.config}
        options.pop("transformers_version", None)  # another version of the library computes the same tokens
        digest.update(json.dumps(options, sort_keys=True, default=str).encode())
        hash_weights(digest, self.encoder.weights())
        return digest.hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None, suffix: str = "") -> None:
        """Write text_encoder/ and tokenizer/ into a model folder; dtype None keeps the dtype of the weights.

        Args:
            suffix: Appended to the names of both folders: "_2" for the second of two encoders, as in diffusers.
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


def _width(config: dict[str, Any]) -> int:
    return config.get("hidden_size") or config["d_model"]
