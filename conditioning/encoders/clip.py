"""CLIP's text transformer (Radford et al. 2021) with transformers' parameter names: importing theirs takes seconds.

It is the text encoder of Stable Diffusion 1 and 2, most of open_clip's towers, and what is trained from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.encoders.bert import empty_embedding

DEFAULTS = {  # what a config.json of transformers need not say
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "projection_dim": 512,
}
MARK = {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
PROJECTS = {"architectures": ["CLIPTextModelWithProjection"]}  # with the matrix of the pooled output, as SDXL's second
LEGACY_END = 2  # eos_token_id in OpenAI's files, where the end really is the largest id
PROJECTION = "text_projection.weight"
POSITION_IDS = "text_model.embeddings.position_ids"  # a buffer [1, L] of 0, 1, 2, ... that older files hold


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Clip(nn.Module):
    """Causal text encoder: ids and mask [B, L] -> the last layer's tokens [B, L, d], after the final norm.

    Attributes:
        text_projection: d -> p without bias, of the pooled output; only where config.json says that there is one.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        model = self.text_model = nn.Module()
        model.embeddings, model.encoder = nn.Module(), nn.Module()
        model.embeddings.token_embedding = empty_embedding(config["vocab_size"], width)
        model.embeddings.position_embedding = empty_embedding(config["max_position_embeddings"], width)
        model.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        model.final_layer_norm = nn.LayerNorm(width, eps=eps)
        if projects(config):
            self.text_projection = nn.Linear(width, config["projection_dim"], bias=False)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B, L, d]; mask True where a token counts, None where all do."""
        return self.layers(ids, mask)[1]

    def layers(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What goes into the last layer [B, L, d], with no norm, and the tokens of `forward` [B, L, d]."""
        tables, length = self.text_model.embeddings, ids.shape[1]
        x = tables.token_embedding(ids) + tables.position_embedding.weight[:length]  # [B, L] -> [B, L, d]
        attended = None
        if mask is not None:
            causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            attended = causal & mask[:, None, None, :]  # [B, L] -> [B, 1, L, L]
        before = x
        for layer in self.text_model.encoder.layers:
            before, x = x, layer(x, attended)
        return before, self.text_model.final_layer_norm(x)

    def pooled(self, ids: Tensor, tokens: Tensor) -> Tensor:
        """The tokens [B, L, d] where each text ends, projected: [B, p]."""
        end = self.config.get("eos_token_id", LEGACY_END)
        ends = ids if end == LEGACY_END else (ids == end).int()
        x = tokens[torch.arange(len(ids), device=ids.device), ends.argmax(dim=1)]  # [B, L, d] -> [B, d], the first end
        return self.text_projection(x) if projects(self.config) else x

    def freeze_end(self) -> None:
        """Let the last layer and the final norm learn no more, for who reads only what goes into them."""
        for module in (self.text_model.encoder.layers[-1], self.text_model.final_layer_norm):
            module.requires_grad_(False)

    @property
    def pooled_dim(self) -> int:
        """p of the pooled output."""
        return self.config["projection_dim" if projects(self.config) else "hidden_size"]

    def weights(self) -> dict[str, Tensor]:
        """Parameters by transformers' names."""
        return self.state_dict()


class Layer(nn.Module):
    """Causal self-attention and feed-forward, each on the norm of the residual stream (pre-norm)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.self_attn = SelfAttention(width, config["num_attention_heads"])
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = ACTIVATIONS[config["hidden_act"]]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class SelfAttention(nn.Module):
    """Attention to the tokens before; a mask [B, 1, L, L] takes the place of the plain causal one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, L, d] -> [B, heads, L, d / heads]
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # [B, heads, L, d / heads] -> [B, L, d]


def is_plain_clip(config: Mapping[str, Any]) -> bool:
    """True for a config.json that this file computes exactly; other variants go through transformers."""
    if config.get("model_type") not in ("clip", "clip_text_model"):
        return False
    own = clip_config(config)
    return not own["attention_dropout"] and own["hidden_act"] in ACTIVATIONS


def projects(config: Mapping[str, Any]) -> bool:
    """True for a config.json of a text encoder with the projection of its pooled output."""
    return config.get("architectures") == PROJECTS["architectures"]


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text encoder's own part of a CLIP's config.json, defaults said."""
    if config["model_type"] == "clip":
        config = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    mark = MARK | PROJECTS if projects(config) else MARK
    return {**DEFAULTS, **{key: value for key, value in config.items() if key != "_name_or_path"}, **mark}


def clip_weights(weights: Mapping[str, Tensor], layers: int, projection: bool = False) -> dict[str, Tensor]:
    """The text encoder's own weights out of a checkpoint: no images, no layer past the last wanted.

    With `projection`, also that of the pooled output.
    """
    kept = {}
    for name, weight in weights.items():
        if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            name = f"text_model.{name}"  # transformers 5 writes it with and without
        surplus = name.startswith("text_model.encoder.layers.") and int(name.split(".")[3]) >= layers
        if name.startswith("text_model.") and not surplus and name != POSITION_IDS:
            kept[name] = weight
        if name == PROJECTION and projection:
            kept[name] = weight
    return kept


def empty_clip(config: dict[str, Any]) -> Clip:
    """A Clip whose parameters are not yet allocated; load_state_dict(assign=True) gives it some."""
    with torch.device("meta"):
        return Clip(config)
