"""BERT's encoder (Devlin et al. 2018) with the parameter names of transformers, whose import takes three seconds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.encoders.transformer_layers import attend, empty_embedding


def is_plain_bert(config: dict[str, Any]) -> bool:
    """Return whether this module implements a config.json exactly; transformers computes all other variants."""
    plain = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    return config.get("model_type") == "bert" and all(config.get(key, value) == value for key, value in plain.items())


class Bert(nn.Module):
    """Bidirectional text encoder: ids and mask [B, L] -> tokens [B, L, d] of the last layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(BertLayer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, L, d]; the mask is True for tokens to attend to, None for all."""
        x = self.embeddings(ids)  # [B, L] -> [B, L, d]
        attended = None if mask is None else mask[:, None, None, :]  # [B, L] -> [B, 1, 1, L]
        for layer in self.encoder.layer:
            x = layer(x, attended)
        return x

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters under transformers' names."""
        return self.state_dict()


class BertEmbeddings(nn.Module):
    """Sum of word, position and segment (always 0) embeddings, followed by a norm."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = empty_embedding(config["vocab_size"], width)
        self.position_embeddings = empty_embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = empty_embedding(config.get("type_vocab_size", 2), width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-12))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]  # [B, L] -> [B, L, d]
        return self.LayerNorm(x + self.position_embeddings.weight[: ids.shape[1]])


class BertLayer(nn.Module):
    """Self-attention and feed-forward block, each followed by its residual and norm (post-norm)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = nn.Module()
        self.attention.self = BertSelfAttention(width, config["num_attention_heads"])
        self.attention.output = BertOutput(width, width, config)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, inner)
        self.output = BertOutput(inner, width, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention.output(self.attention.self(x, mask), x)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class BertSelfAttention(nn.Module):
    """Multi-head self-attention without an output projection, which is a part of `BertOutput`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return attend(self.query(x), self.key(x), self.value(x), self.heads, mask)


class BertOutput(nn.Module):
    """Projection, residual and norm."""

    def __init__(self, inner: int, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-12))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


def bert_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the encoder without its heads."""
    return {**{key: value for key, value in config.items() if key != "_name_or_path"}, "architectures": ["BertModel"]}


def bert_weights(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return the weights of the first `layers` layers of a checkpoint, without task heads and pooler."""
    encoder = {}
    for name, weight in weights.items():
        name = name.removeprefix("bert.")
        surplus = name.startswith("encoder.layer.") and int(name.split(".")[2]) >= layers
        if name.startswith(("embeddings.", "encoder.")) and not surplus and not name.endswith("position_ids"):
            encoder[name] = weight
    return encoder


def empty_bert(config: dict[str, Any]) -> Bert:
    """Return a Bert on "meta", for load_state_dict(assign=True)."""
    with torch.device("meta"):
        return Bert(config)
