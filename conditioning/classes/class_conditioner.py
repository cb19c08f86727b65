"""Conditioners without text: a table of classes (ImageNet in Rombach et al. 2022, table 10), and no condition at all.

The embedding of a class is a token for cross-attention, as in the paper, or a vector that is added to the time
embedding (Dhariwal & Nichol 2021).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.classes.class_names import ClassConfig, ClassNames, check_names
from conditioning.encoders.pretrained import WEIGHTS, read_config
from conditioning.encoders.transformer_layers import empty_embedding
from conditioning.interface.conditioner import PromptConditioner
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.interface.tokens import Tokens
from stipple_core.files.json_file import read_json
from stipple_core.files.weights import place, read_folder, write_weights

MODEL_TYPE = "class_embedding"  # Stipple's own, in text_encoder/config.json
IMAGENET = 1000  # classes; a table with one more row has the null class there, as LDM's guided model


class ClassConditioner(PromptConditioner):
    """Classes as prompts -> Context with tokens [B, 1, d] or a vector [B, d]; the empty prompt is the null class.

    Args:
        table: Embeddings [classes, d].
        null_class: Row of the null class; None if the table has none, in which case guidance is not possible.
        trainable: Whether gradients are computed.
        names: Names of the first rows, which prompts may use instead of numbers.
        encoded_as: "tokens" or "vector".
    """

    max_length = 1

    def __init__(
        self,
        table: Tensor,
        null_class: int | None,
        trainable: bool = False,
        names: Sequence[str] = (),
        encoded_as: str = "tokens",
    ) -> None:
        super().__init__()
        self.null_class, self.trainable, self.encoded_as = null_class, trainable, encoded_as
        self.tokenizer = ClassNames(names)
        self.embedding = empty_embedding(*table.shape)
        self.embedding.weight = nn.Parameter(table, requires_grad=trainable)

    @property
    def context_dim(self) -> int | None:
        """d of the tokens [B, 1, d]; None if a class is a vector."""
        return self.embedding.embedding_dim if self.encoded_as == "tokens" else None

    @property
    def vector_dim(self) -> int | None:
        """d of the vector [B, d]; None if a class is a token."""
        return self.embedding.embedding_dim if self.encoded_as == "vector" else None

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return rows of the table [B, 1]. Raises ValueError for a prompt that is not a class."""
        ids = torch.tensor([self._row(prompt) for prompt in prompts], dtype=torch.long).reshape(-1, 1)
        return Tokens(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))

    def forward(self, ids: Tensor, mask: Tensor, inputs: ConditionInputs | None = None) -> Context:
        """Return the context of rows [B, 1]; the mask, which is all True, has no effect."""
        embedded = self.embedding(ids)  # [B, 1] -> [B, 1, d]
        return Context(tokens=embedded) if self.encoded_as == "tokens" else Context(vector=embedded[:, 0])

    def fingerprint(self) -> str:
        """Return a SHA-256 over the table, the names and the null class."""
        weight = self.embedding.weight.detach().cpu().contiguous()
        meaning = f"{self.null_class} {self.encoded_as} {self.tokenizer.names}"
        digest = hashlib.sha256(f"{meaning} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write text_encoder/ into a model folder; dtype None keeps the dtype of the table."""
        folder = Path(model_folder) / "text_encoder"
        folder.mkdir(parents=True, exist_ok=True)
        write_weights({"embedding.weight": self.embedding.weight.to(dtype)}, folder / "model.safetensors")
        rows, width = self.embedding.weight.shape
        config = {"model_type": MODEL_TYPE, "num_classes": rows, "hidden_size": width, "null_class": self.null_class}
        config |= {"told_as": self.encoded_as, "class_names": self.tokenizer.names}  # keys of existing model folders
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _row(self, prompt: str) -> int:
        text = prompt.strip()
        if not text and self.null_class is None:
            raise ValueError(
                f"this model has {self.embedding.num_embeddings} classes but no null class, which guidance and the "
                "empty prompt require; use a class number and guidance_scale 1"
            )
        row = self.null_class if not text else self.tokenizer.row(text)
        classes = self.embedding.num_embeddings if self.null_class is None else self.null_class
        if row is None or (text and not 0 <= row < classes):
            fix = self.tokenizer.near(text) if self.tokenizer.names else f"use a number from 0 to {classes - 1}"
            raise ValueError(f"prompt {prompt!r:.80} is not a class of this model; {fix}")
        return row


class Unconditional(PromptConditioner):
    """No condition at all: the only prompt is "", and its context has no fields."""

    max_length, trainable, tokenizer, context_dim = 0, False, None, None

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Return no tokens [B, 0]. Raises ValueError for a prompt that is not empty."""
        for prompt in prompts:
            if prompt.strip():
                raise ValueError(f"prompt {prompt!r:.80} can't be used: this model is unconditional; leave it empty")
        return Tokens(ids=torch.zeros(len(prompts), 0, dtype=torch.long), mask=torch.zeros(len(prompts), 0).bool())

    def forward(self, ids: Tensor, mask: Tensor, inputs: ConditionInputs | None = None) -> Context:
        """Return a context without fields."""
        return Context()

    def encode(self, prompts: Sequence[str], inputs: ConditionInputs | None = None) -> Context:
        """Return a context without fields. Raises ValueError for a prompt that is not empty."""
        self.tokenize(prompts)
        return Context()

    def fingerprint(self) -> str:
        """Return the SHA-256 that all unconditional models share."""
        return hashlib.sha256(b"unconditional").hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write nothing: model_index.json names no text encoder, as in diffusers' LDMPipeline."""


def new_classes(config: ClassConfig, captions: Iterable[str] | None, seed: int) -> ClassConditioner:
    """Return a new table of classes with weights drawn from the seed; its last row is the null class.

    Args:
        captions: Captions of the training set, each of them a class. They are the names if the config has none.

    Raises:
        ValueError: A caption is not a class, or the config has no classes and there are no captions.
    """
    captions = None if captions is None else sorted({text.strip() for text in captions} - {""})
    names = config.names or ([] if config.count is not None else captions)
    if not names and config.count is None:
        raise ValueError("there are no classes; set classes.names or classes.count, or use captions that name them")
    check_names(names)
    rows = config.count or len(names)
    table = torch.randn(rows + 1, config.width, generator=torch.Generator().manual_seed(seed))
    conditioner = ClassConditioner(table, rows, True, names, config.told_as)
    conditioner.tokenize(captions or [])  # raises for a caption that is not a class
    return conditioner


def class_conditioner(table: Tensor) -> ClassConditioner:
    """Return the conditioner of a CompVis model's table; a row after ImageNet's 1000 is the null class."""
    return ClassConditioner(table, IMAGENET if len(table) == IMAGENET + 1 else None)


def load_classes(
    folder: Path, dtype: torch.dtype | None = None, trainable: bool = False, variant: str | None = None
) -> ClassConditioner:
    """Read a text_encoder/ folder that `ClassConditioner.save` wrote; dtype None is float32."""
    config: dict[str, Any] = read_config(folder)
    try:
        rows, width, null_class = (config[key] for key in ("num_classes", "hidden_size", "null_class"))
        names, encoded_as = config.get("class_names", ()), config.get("told_as", "tokens")
        table = torch.empty(rows, width, device="meta")
        conditioner = ClassConditioner(table, null_class, trainable, names, encoded_as)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} does not describe a table of classes: {type(error).__name__} {error}"
        ) from None
    weights = read_folder(folder, WEIGHTS, variant)
    place(conditioner, {name: w.to(dtype or torch.float32) for name, w in weights.items()}, folder)
    return conditioner


def is_unconditional(model_folder: Path) -> bool:
    """Return whether the model_index.json of a model folder names no text encoder."""
    try:
        index = read_json(model_folder / "model_index.json")
    except (OSError, ValueError):
        return False
    return not any(any(index.get(part) or ()) for part in ("text_encoder", "bert"))
