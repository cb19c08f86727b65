"""CLIP's text encoder (Radford et al. 2021) with the parameter names of transformers, whose import takes seconds.

It is the text encoder of Stable Diffusion 1 and 2, of most open_clip models, and of models trained from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.encoders.transformer_layers import SelfAttention, empty_embedding

DEFAULTS = {  # of options that are absent from a config.json
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
PROJECTS = {"architectures": ["CLIPTextModelWithProjection"]}  # with a pooled output, as SDXL's second
LEGACY_END = 2  # eos_token_id in OpenAI's files; the true end token is the largest id
PROJECTION = "text_projection.weight"
POSITION_IDS = "text_model.embeddings.position_ids"  # buffer [1, L] of 0, 1, 2, ... in older files


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Clip(nn.Module):
    """Causal text encoder: ids and mask [B, L] -> tokens [B, L, d] of the last layer, after the final norm.

    Attributes:
        text_projection: d -> p without bias, for the pooled output; exists only if the config asks for it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        model = self.text_model = nn.Module()
        model.embeddings, model.encoder = nn.Module(), nn.Module()
        model.embeddings.token_embedding = empty_embedding(config["vocab_size"], width)
        model.embeddings.position_embedding = empty_embedding(config["max_position_embeddings"], width)
        model.encoder.layers = nn.ModuleList(ClipLayer(config) for _ in range(config["num_hidden_layers"]))
        model.final_layer_norm = nn.LayerNorm(width, eps=eps)
        if projects(config):
            self.text_projection = nn.Linear(width, config["projection_dim"], bias=False)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, L, d]; the mask is True for tokens to attend to, None for all."""
        return self.layers(ids, mask)[1]

    def layers(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the input of the last layer [B, L, d], without a norm, and the tokens of `forward` [B, L, d]."""
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
        """Return the projected token at the end of each text: [B, L, d] -> [B, p]."""
        end = self.config.get("eos_token_id", LEGACY_END)
        ends = ids if end == LEGACY_END else (ids == end).int()
        x = tokens[torch.arange(len(ids), device=ids.device), ends.argmax(dim=1)]  # [B, L, d] -> [B, d], the first end
        return self.text_projection(x) if projects(self.config) else x

    def freeze_end(self) -> None:
        """Freeze the last layer and the final norm, for callers that read only the input of the last layer."""
        for module in (self.text_model.encoder.layers[-1], self.text_model.final_layer_norm):
            module.requires_grad_(False)

    @property
    def pooled_dim(self) -> int:
        """p of the pooled output."""
        return self.config["projection_dim" if projects(self.config) else "hidden_size"]

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters under transformers' names."""
        return self.state_dict()


class ClipLayer(nn.Module):
    """Causal self-attention and feed-forward block, each with its norm first (pre-norm)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.self_attn = SelfAttention(width, config["num_attention_heads"], inner=width, bias=True, causal=True)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = ACTIVATIONS[config["hidden_act"]]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


def is_plain_clip(config: Mapping[str, Any]) -> bool:
    """Return whether this module implements a config.json exactly; transformers computes all other variants."""
    if config.get("model_type") not in ("clip", "clip_text_model"):
        return False
    options = clip_config(config)
    return not options["attention_dropout"] and options["hidden_act"] in ACTIVATIONS


def projects(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes a text encoder with a projection of the pooled output."""
    return config.get("architectures") == PROJECTS["architectures"]


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the text encoder in the config.json of a CLIP, including the defaults."""
    if config["model_type"] == "clip":
        config = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    mark = MARK | PROJECTS if projects(config) else MARK
    return {**DEFAULTS, **{key: value for key, value in config.items() if key != "_name_or_path"}, **mark}


def clip_weights(weights: Mapping[str, Tensor], layers: int, projection: bool = False) -> dict[str, Tensor]:
    """Return the weights of the first `layers` layers of the text encoder of a checkpoint.

    Args:
        projection: Whether to include the projection of the pooled output.
    """
    encoder = {}
    for name, weight in weights.items():
        if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            name = f"text_model.{name}"  # transformers 5 writes names with and without the prefix
        surplus = name.startswith("text_model.encoder.layers.") and int(name.split(".")[3]) >= layers
        if name.startswith("text_model.") and not surplus and name != POSITION_IDS:
            encoder[name] = weight
        if name == PROJECTION and projection:
            encoder[name] = weight
    return encoder


def empty_clip(config: dict[str, Any]) -> Clip:
    """Return a Clip on "meta", for load_state_dict(assign=True)."""
    with torch.device("meta"):
        return Clip(config)
