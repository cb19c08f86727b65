"""BERT's encoder (Devlin et al. 2018) with transformers' parameter names: importing theirs takes three seconds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_plain_bert(config: dict[str, Any]) -> bool:
    """True for a config.json that this file computes exactly; other variants go through transformers."""
    plain = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    return config.get("model_type") == "bert" and all(config.get(key, value) == value for key, value in plain.items())


class Bert(nn.Module):
    """Bidirectional text encoder: ids and mask [B, L] -> the last layer's tokens [B, L, d]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, L, d]; mask True where a token counts, None where all do."""
        x = self.embeddings(ids)  # [B, L] -> [B, L, d]
        attended = None if mask is None else mask[:, None, None, :]  # [B, L] -> [B, 1, 1, L]
        for layer in self.encoder.layer:
            x = layer(x, attended)
        return x

    def weights(self) -> dict[str, Tensor]:
        """Parameters by transformers' names."""
        return self.state_dict()


class Embeddings(nn.Module):
    """Word + position + segment (always 0), normalised."""

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


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by its residual and norm (post-norm)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = nn.Module()
        self.attention.self = SelfAttention(width, config["num_attention_heads"])
        self.attention.output = Output(width, width, config)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, inner)
        self.output = Output(inner, width, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention.output(self.attention.self(x, mask), x)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, L, d] -> [B, heads, L, d / heads]
            for linear in (self.query, self.key, self.value)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x.transpose(1, 2).flatten(2)  # [B, heads, L, d / heads] -> [B, L, d]


class Output(nn.Module):
    """A projection, the residual, the norm."""

    def __init__(self, inner: int, width: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-12))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


def bert_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the encoder alone."""
    return {**{key: value for key, value in config.items() if key != "_name_or_path"}, "architectures": ["BertModel"]}


def bert_weights(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The encoder's own weights out of a checkpoint: no task heads, no pooler, no layer past the last one wanted."""
    kept = {}
    for name, weight in weights.items():
        name = name.removeprefix("bert.")
        surplus = name.startswith("encoder.layer.") and int(name.split(".")[2]) >= layers
        if name.startswith(("embeddings.", "encoder.")) and not surplus and not name.endswith("position_ids"):
            kept[name] = weight
    return kept


def empty_embedding(size: int, width: int) -> nn.Embedding:
    """A table without values: nn.Embedding's own draw of them imports torch._dynamo on the meta device, 2.5 s."""
    return nn.Embedding.from_pretrained(torch.empty(size, width), freeze=False)


def empty_bert(config: dict[str, Any]) -> Bert:
    """A Bert whose parameters are not yet allocated; load_state_dict(assign=True) gives it some."""
    with torch.device("meta"):
        return Bert(config)
