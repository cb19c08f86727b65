"""Text encoders of open_clip models: tokens of the last or penultimate layer, with or without the final norm.

Most of them are plain CLIP transformers and are converted to a CLIPTextModel, which other programs open. Those that a
CLIPTextModel can't represent (no final norm, CoCa's class token, a Hugging Face model) remain modules of open_clip,
with a model_type of Stipple's own.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.encoders.clip import PROJECTION, PROJECTS, Clip, empty_clip
from conditioning.encoders.open_clip_names import tower_config, tower_from_open_clip
from conditioning.encoders.pretrained import WEIGHTS, read_config
from conditioning.tokenizers.tokenizer import Tokenizer, read_tokenizer
from stipple_core.files.json_file import read_json
from stipple_core.files.weights import place, read_folder

MODEL_TYPE = "open_clip"  # Stipple's own, in text_encoder/config.json
PLAIN = {  # options of a text_cfg that a CLIPTextModel can represent
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    *("pad_id", "eos_id", "pool_type", "proj_type", "proj_bias", "final_ln_after_pool", "output_tokens"),
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
}


class OpenClipEncoder(nn.Module):
    """Wrapper of an open_clip text tower: ids and mask [B, L] -> tokens [B, L, d], without projection and pooling.

    Args:
        arch: "text_cfg", "embed_dim" and "quick_gelu" of open_clip's model config.
        final_norm: Whether to apply the last LayerNorm of the tower, as Stable Diffusion 2 does.
        tower_config: The config.json of a tower that is a Hugging Face model; None for open_clip's transformer.
    """

    def __init__(self, tower: nn.Module, arch: dict[str, Any], final_norm: bool, tower_config: dict | None) -> None:
        super().__init__()
        self.tower, self.arch, self.final_norm, self.tower_config = tower, arch, final_norm, tower_config

    @property
    def config(self) -> dict[str, Any]:
        """Contents of text_encoder/config.json."""
        width = self.tower_config["hidden_size"] if self.tower_config else self.tower.width
        positions = self.tower_config.get("max_position_embeddings") if self.tower_config else self.tower.context_length
        config = {"model_type": MODEL_TYPE, "hidden_size": width, "max_position_embeddings": positions, **self.arch}
        return {**config, "final_norm": self.final_norm, "tower_config": self.tower_config}

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return tokens [B, L, d]. Only Hugging Face towers use the mask; open_clip's transformer is causal."""
        if self.tower_config:
            attended = None if mask is None else mask.long()
            return self.tower.transformer(input_ids=ids, attention_mask=attended).last_hidden_state
        x, attended = self.tower._embeds(ids)  # [B, L] -> [B, L, d] (L + 1 with CoCa's class token)
        x = self.tower.transformer(x, attn_mask=attended)
        x = x[:, : ids.shape[1]]  # [B, L + 1, d] -> [B, L, d]
        return self.tower.ln_final(x) if self.final_norm else x

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters under open_clip's names."""
        return self.tower.state_dict()


def build_open_clip(
    name: str,
    pretrained: str | None,
    drop_layers: int,
    final_norm: bool,
    max_length: int | None,
    projection: bool = False,
) -> tuple[Tokenizer, OpenClipEncoder | Clip]:
    """Return the tokenizer and the text encoder of an open_clip model.

    Args:
        name: An architecture ("ViT-H-14"), "hf-hub:OWNER/NAME" or "local-dir:FOLDER".
        pretrained: open_clip's tag ("laion2b_s32b_b79k"), a file, or "random"; unused with hf-hub: and local-dir:.
        drop_layers: Number of layers to remove at the end; 1 selects the penultimate layer.
        projection: Whether to include the projection of the pooled output, if the result is a CLIPTextModel.

    Raises:
        ValueError, FileNotFoundError: In one line, if open_clip does not have the model or can't download it.
    """
    import open_clip

    if ":" not in name and name not in open_clip.list_models():
        similar = [other for other in open_clip.list_models() if other.lower()[:5] == name.lower()[:5]]
        raise ValueError(f"open_clip has no architecture {name!r}; similar ones: {', '.join(similar[:8]) or 'none'}")
    if ":" not in name and not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(
            f"open_clip {name} requires `pretrained`: a file, random, or one of the tags {tags or '(none)'}"
        )
    weights = None if pretrained == "random" else pretrained
    try:
        model = _create(name, weights)
        arch = _arch(name)
        tokenizer = _tokenizer(name, arch["text_cfg"], max_length)
        return tokenizer, _text_tower(model, arch, drop_layers, final_norm, projection)
    except Exception as error:  # the hub, torch and open_clip raise various classes
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"open_clip {name!r} with pretrained {pretrained!r} can't be loaded: {type(error).__name__}: {reason}; "
            "without a network, set `pretrained` to a downloaded file"
        ) from None


def load_open_clip(folder: Path, dtype: torch.dtype | None, variant: str | None = None) -> OpenClipEncoder:
    """Load a text encoder that `TextConditioner.save` wrote, without network access; dtype None is float32."""
    config = read_config(folder)
    weights = read_folder(folder, WEIGHTS, variant)
    arch = {key: config[key] for key in ("embed_dim", "quick_gelu", "text_cfg")}
    tower = _build_tower(arch, config["tower_config"])
    place(tower, weights, f"the text encoder in {folder}")
    return OpenClipEncoder(tower.to(dtype or torch.float32), arch, config["final_norm"], config["tower_config"])


def _create(name: str, pretrained: str | None) -> nn.Module:
    import open_clip

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # hides "no pretrained weights loaded", which "random" requests
    try:
        return open_clip.create_model(name, pretrained=pretrained)
    finally:
        logging.disable(level)


def _arch(name: str) -> dict[str, Any]:
    """Return the entries of open_clip's model config that define the text tower."""
    import open_clip

    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        config = read_json(path)["model_cfg"]
    elif name.startswith("hf-hub:"):
        from open_clip.factory import _get_hf_config

        config = _get_hf_config(name.removeprefix("hf-hub:"))["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
    return {
        "embed_dim": config["embed_dim"],
        "quick_gelu": config.get("quick_gelu", False),
        "text_cfg": {key: value for key, value in config["text_cfg"].items()},
    }


def _text_tower(
    model: nn.Module, arch: dict[str, Any], drop_layers: int, final_norm: bool, projection: bool
) -> OpenClipEncoder | Clip:
    """Return the text tower of a model without its last drop_layers layers."""
    text_cfg = arch["text_cfg"]
    weights = model.text.state_dict() if hasattr(model, "text") else model.state_dict()
    if text_cfg.get("hf_model_name"):
        if drop_layers or not final_norm:
            raise ValueError("layer and final_norm are not supported for a Hugging Face tower; use kind: transformers")
        hf_config = json.loads(model.text.config.to_json_string(use_diff=False))
        return OpenClipEncoder(model.text, arch, final_norm, {**hf_config, "_name_or_path": ""})
    text_cfg = {**text_cfg, "layers": text_cfg.get("layers", 12) - drop_layers}
    arch = {**arch, "text_cfg": text_cfg}
    tower = _build_tower(arch, None)
    weights = {key: weights[key] for key in tower.state_dict()}
    if final_norm and not any(value for key, value in text_cfg.items() if key not in PLAIN):
        return _plain(weights, tower.heads, arch["quick_gelu"], projection)
    tower.load_state_dict(weights, strict=True)
    return OpenClipEncoder(tower, arch, final_norm, None)


def _plain(weights: dict[str, Tensor], heads: int, quick_gelu: bool, projection: bool) -> Clip:
    """Convert a tower to a CLIPTextModel."""
    config = tower_config(weights, heads, "quick_gelu" if quick_gelu else "gelu")
    named = tower_from_open_clip(weights, config["num_hidden_layers"])
    if projection:
        config |= PROJECTS
        named[PROJECTION] = weights["text_projection"].T  # [d, p] -> [p, d]
    clip = empty_clip(config)
    place(clip, named, "the text tower of open_clip")
    return clip


def _build_tower(arch: dict[str, Any], tower_config: dict[str, Any] | None) -> nn.Module:
    """Return an uninitialized tower; a Hugging Face tower is built from its config, without the hub."""
    from open_clip.model import _build_text_tower

    if tower_config is None:
        return _build_text_tower(arch["embed_dim"], arch["text_cfg"], arch["quick_gelu"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(tower_config))
        local = {**arch["text_cfg"], "hf_model_name": folder, "hf_model_pretrained": False}
        return _build_text_tower(arch["embed_dim"], local, arch["quick_gelu"])


def _tokenizer(name: str, text_cfg: dict[str, Any], max_length: int | None) -> Tokenizer:
    """Convert open_clip's tokenizer to a pipeline of `tokenizers` with open_clip's text cleaning: same ids, faster."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    original = open_clip.get_tokenizer(name)
    options = text_cfg.get("tokenizer_kwargs") or {}
    mode = text_cfg.get("tokenizer_mode")
    if {*options} - {"clean"} or mode or not isinstance(original, HFTokenizer | SimpleTokenizer):
        raise ValueError(
            f"{type(original).__name__} with options {options} and mode {mode} is not supported; only `clean` is"
        )
    length = text_cfg.get("context_length", 77)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(original, HFTokenizer):
            original.tokenizer.save_pretrained(folder)
        else:
            _simple_tokenizer(original).save_pretrained(folder)
        tokenizer = read_tokenizer(Path(folder), max_length or length, length)
    default = "whitespace" if isinstance(original, HFTokenizer) else "lower"
    tokenizer.options["open_clip_clean"] = options.get("clean", default)
    return tokenizer


def _simple_tokenizer(original: Any) -> Any:
    """Convert open_clip's SimpleTokenizer to a CLIPTokenizer of transformers: vocabulary, special tokens, padding."""
    from transformers import CLIPTokenizer

    start, end = original.decoder[original.sot_token_id], original.decoder[original.eot_token_id]
    merges = sorted(original.bpe_ranks, key=original.bpe_ranks.__getitem__)
    return CLIPTokenizer(
        original.encoder, merges, unk_token=end, bos_token=start, eos_token=end, pad_token=original.decoder[0]
    )
