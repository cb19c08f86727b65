"""Conditioners without text: a table of classes (ImageNet in Rombach et al. 2022, table 10), and none at all.

A class is a token for cross-attention, as there, or a vector for the time embedding (Dhariwal & Nichol 2021).
Both have the public members of `Conditioner`, so that a model can hold any of the three.
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
from conditioning.encoders.bert import empty_embedding
from conditioning.encoders.pretrained import WEIGHTS, read_config
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.tokenizers.tokenizer import Tokens
from stipple_core.files.weights import place, read_folder, write_weights

MODEL_TYPE = "class_embedding"  # our mark in text_encoder/config.json
IMAGENET = 1000  # classes; a table of one row more has the null class there, as LDM's guided model


class ClassConditioner(nn.Module):
    """Classes as prompts -> Context with tokens [B, 1, d] or a vector [B, d]; the empty prompt is the null class.

    Args:
        table: embeddings [classes, d].
        null_class: the row that stands for no class; None where there is none, and so no guidance.
        trainable: lets gradients through.
        names: of the first rows, by which prompts may call them, too.
        told_as: "tokens" or "vector".
    """

    max_length, use_mask, latent_channels, hint, readers = 1, False, 0, None, {}
    reads, required_to_sample, has_positions, reads_text, zero_empty = frozenset(), frozenset(), False, False, None

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
        """d of the tokens [B, 1, d]; None where a class is a vector."""
        return self.embedding.embedding_dim if self.encoded_as == "tokens" else None

    @property
    def vector_dim(self) -> int | None:
        """d of the vector [B, d]; None where a class is a token."""
        return self.embedding.embedding_dim if self.encoded_as == "vector" else None

    @property
    def prompts(self) -> ClassConditioner:
        """What reads prompts: itself."""
        return self

    @property
    def components(self) -> dict[str, list[str | None]]:
        """What model_index.json says of it: nothing that diffusers could load."""
        return {"text_encoder": [None, None], "tokenizer": [None, None]}

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Rows of the table [B, 1]. Raises ValueError for a prompt that is no class."""
        ids = torch.tensor([self._number(prompt) for prompt in prompts], dtype=torch.long).reshape(-1, 1)
        return Tokens(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))

    def forward(self, ids: Tensor, mask: Tensor, given: ConditionInputs | None = None) -> Context:
        """Context of rows [B, 1]; the mask, which is all true, has no effect."""
        embedded = self.embedding(ids)  # [B, 1] -> [B, 1, d]
        return Context(tokens=embedded) if self.encoded_as == "tokens" else Context(vector=embedded[:, 0])

    def encode(self, prompts: Sequence[str], given: ConditionInputs | None = None) -> Context:
        """Context of B prompts such as "207" or "golden retriever", on the table's device."""
        if not prompts:
            raise ValueError("there are no prompts to encode")
        tokens = self.tokenize(prompts)
        return self(tokens.ids.to(self.embedding.weight.device), tokens.mask)

    def null(self, batch: int = 1) -> Context:
        """The context of the null class. Raises ValueError where there is none."""
        return self.encode([""]).repeat(batch)

    def cut(self, prompt: str) -> str:
        """Nothing: a class always fits."""
        return ""

    def fingerprint(self) -> str:
        """sha256 over the table, its names and the null class."""
        weight = self.embedding.weight.detach().cpu().contiguous()
        meaning = f"{self.null_class} {self.told_as} {self.tokenizer.names}"
        digest = hashlib.sha256(f"{meaning} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes text_encoder/ into a model folder; dtype None keeps the table's own."""
        folder = Path(model_folder) / "text_encoder"
        folder.mkdir(parents=True, exist_ok=True)
        write_weights({"embedding.weight": self.embedding.weight.to(dtype)}, folder / "model.safetensors")
        rows, width = self.embedding.weight.shape
        config = {"model_type": MODEL_TYPE, "num_classes": rows, "hidden_size": width, "null_class": self.null_class}
        config |= {"told_as": self.encoded_as, "class_names": self.tokenizer.names}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _number(self, prompt: str) -> int:
        text = prompt.strip()
        if not text and self.null_class is None:
            raise ValueError(
                f"none of this model's {self.embedding.num_embeddings} classes is the null class, which guidance and "
                "the empty prompt need; give a class number and guidance_scale 1"
            )
        number = self.null_class if not text else self.tokenizer.row(text)
        classes = self.embedding.num_embeddings if self.null_class is None else self.null_class
        if number is None or (text and not 0 <= number < classes):
            mend = f"give a number from 0 to {classes - 1}"
            if self.tokenizer.names:
                mend = self.tokenizer.near(text)
            raise ValueError(f"prompt {prompt!r:.80} is no class of this model; {mend}")
        return number


class Unconditional(nn.Module):
    """No condition at all: the only prompt is "", its context has no field."""

    max_length, use_mask, trainable, latent_channels = 0, False, False, 0
    context_dim, vector_dim, tokenizer, hint, readers = None, None, None, None, {}
    reads, required_to_sample, has_positions, reads_text, zero_empty = frozenset(), frozenset(), False, False, None
    components = {"text_encoder": [None, None], "tokenizer": [None, None]}

    @property
    def prompts(self) -> Unconditional:
        """What reads prompts: itself."""
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """No tokens [B, 0]. Raises ValueError for a prompt that is not empty."""
        for prompt in prompts:
            if prompt.strip():
                raise ValueError(f"prompt {prompt!r:.80} is of no use: this model is unconditional; leave it empty")
        return Tokens(ids=torch.zeros(len(prompts), 0, dtype=torch.long), mask=torch.zeros(len(prompts), 0).bool())

    def forward(self, ids: Tensor, mask: Tensor, given: ConditionInputs | None = None) -> Context:
        """The context with no field."""
        return Context()

    def encode(self, prompts: Sequence[str], given: ConditionInputs | None = None) -> Context:
        """The context with no field. Raises ValueError for a prompt that is not empty."""
        self.tokenize(prompts)
        return Context()

    def null(self, batch: int = 1) -> Context:
        """The context with no field."""
        return Context()

    def cut(self, prompt: str) -> str:
        """Nothing: the empty prompt always fits."""
        return ""

    def fingerprint(self) -> str:
        """The same of every one."""
        return hashlib.sha256(b"unconditional").hexdigest()

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes nothing: a model_index.json without a text encoder says it, as in diffusers' LDMPipeline."""


def new_classes(config: ClassConfig, captions: Iterable[str] | None, seed: int) -> ClassConditioner:
    """A table of classes with weights drawn from the seed, the last row being the null class.

    Args:
        captions: of the training set, each a class; they give the names where the config does not.

    Raises:
        ValueError: a caption is no class, or there are no captions to take names from.
    """
    captions = None if captions is None else sorted({text.strip() for text in captions} - {""})
    names = config.names or ([] if config.count is not None else captions)
    if not names and config.count is None:
        raise ValueError("there are no classes; give classes.names or classes.count, or captions that name them")
    check_names(names)
    rows = config.count or len(names)
    table = torch.randn(rows + 1, config.width, generator=torch.Generator().manual_seed(seed))
    conditioner = ClassConditioner(table, rows, True, names, config.encoded_as)
    conditioner.tokenize(captions or [])  # a caption that is no class is to be found now
    return conditioner


def class_conditioner(table: Tensor) -> ClassConditioner:
    """The conditioner of a CompVis model's table; a row after ImageNet's thousand is the null class."""
    return ClassConditioner(table, IMAGENET if len(table) == IMAGENET + 1 else None)


def load_classes(
    folder: Path, dtype: torch.dtype | None = None, trainable: bool = False, variant: str | None = None
) -> ClassConditioner:
    """Reads what `ClassConditioner.save` wrote into a text_encoder/ folder; dtype None is float32."""
    config: dict[str, Any] = read_config(folder)
    try:
        rows, width, null_class = (config[key] for key in ("num_classes", "hidden_size", "null_class"))
        said = config.get("class_names", ()), config.get("told_as", "tokens")
        conditioner = ClassConditioner(torch.empty(rows, width, device="meta"), null_class, trainable, *said)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no classes: {type(error).__name__} {error}") from None
    weights = read_folder(folder, WEIGHTS, variant)
    place(conditioner, {name: w.to(dtype or torch.float32) for name, w in weights.items()}, folder)
    return conditioner


def is_unconditional(model_folder: Path) -> bool:
    """True for a model folder whose model_index.json names no text encoder."""
    try:
        index = json.loads((model_folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and not any(any(index.get(part) or ()) for part in ("text_encoder", "bert"))
