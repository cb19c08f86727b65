"""The conditioner tau_theta (Rombach et al. 2022, section 3.3): tokenizer + text encoder, prompts to context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.classes import MODEL_TYPE as CLASSES
from conditioning.classes import ClassConditioner, Unconditional, is_unconditional, load_classes
from conditioning.context import Context
from conditioning.layouts import LayoutTokenizer, read_layout_tokenizer
from conditioning.ldm_bert import MODEL_TYPE as LDM_BERT
from conditioning.openclip import MODEL_TYPE as OPEN_CLIP
from conditioning.openclip import build_open_clip, load_open_clip
from conditioning.pretrained import find_encoder, load_encoder, read_config
from conditioning.tokenizer import Tokenizer, Tokens, read_tokenizer
from conditioning.transformer import TransformerConfig, random_transformer, train_tokenizer
from storage.weights import write_weights

ENCODERS = ("text_encoder", "bert")  # folders of a model folder; the second is diffusers' for LDMTextToImage
LAYERS = {"last": 0, "penultimate": 1}  # name -> layers left out at the end
UNMASKED = ("clip", "clip_text_model", OPEN_CLIP, LDM_BERT)  # model types that were trained with no mask


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """Which text encoder conditions the model."""

    kind: str = "transformers"  # transformers | open_clip | scratch
    name: str = ""  # folder or hub name of a transformers model; open_clip architecture; unused for scratch
    pretrained: str | None = None  # open_clip only: tag, file or "random"
    max_length: int | None = None  # tokens per prompt; None: the encoder's own, at most 77
    use_mask: bool | None = None  # hide padding; None: no for CLIP (as Stable Diffusion), yes for all others
    layer: str = "last"  # last | penultimate
    final_norm: bool = True  # open_clip only: norm after the chosen layer
    scratch: TransformerConfig = field(default_factory=TransformerConfig)  # scratch only: size of the transformer


class Conditioner(nn.Module):
    """Prompts -> Context with tokens [B, L, d]; frozen unless trainable.

    Args:
        tokenizer: text to ids of one length L, so that nothing depends on the other prompts of a batch.
        encoder: (ids, mask) [B, L] -> tokens [B, L, d], with .config and .weights().
        use_mask: hides padding from the encoder and, by context.mask, from the UNet.
        trainable: lets gradients through and obeys train(); otherwise no_grad and eval mode for good.
    """

    def __init__(
        self, tokenizer: Tokenizer | LayoutTokenizer, encoder: nn.Module, use_mask: bool, trainable: bool = False
    ) -> None:
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
        """L of the tokens [B, L, d]."""
        return self.tokenizer.max_length

    @property
    def components(self) -> dict[str, list[str | None]]:
        """What model_index.json says of text_encoder/ and tokenizer/: library and class."""
        encoder = (self.encoder.config.get("architectures") or ["AutoModel"])[0]
        library = "latent_diffusion" if encoder == "LDMBertModel" else "transformers"
        tokenizer = self.tokenizer.options.get("tokenizer_class", "AutoTokenizer")
        return {"text_encoder": [library, encoder], "tokenizer": ["transformers", tokenizer]}

    def train(self, mode: bool = True) -> Conditioner:
        """Training mode, which a frozen conditioner never enters."""
        return super().train(mode and self.trainable)

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask [B, L] on the CPU; the end of a prompt that is too long is cut off (see `cut`)."""
        return self.tokenizer(prompts)

    def forward(self, ids: Tensor, mask: Tensor) -> Context:
        """Context of ids and mask [B, L], in one batch; this is what DistributedDataParallel wraps."""
        attended = mask if self.use_mask else None
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return Context(tokens=self.encoder(ids, attended), mask=attended)  # [B, L] -> [B, L, d]

    def encode(self, prompts: Sequence[str]) -> Context:
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

    def save(self, model_folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes text_encoder/ and tokenizer/ into a model folder; dtype None keeps the weights' own."""
        folder = Path(model_folder) / "text_encoder"
        folder.mkdir(parents=True, exist_ok=True)
        floats = {name: weight.is_floating_point() for name, weight in self.encoder.weights().items()}
        weights = {name: w.to(dtype if floats[name] else None) for name, w in self.encoder.weights().items()}
        write_weights(weights, folder / "model.safetensors")
        stored = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
        config = {key: value for key, value in self.encoder.config.items() if key != "torch_dtype"}
        config |= {"dtype": str(stored).removeprefix("torch."), "use_attention_mask": self.use_mask}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        self.tokenizer.save(Path(model_folder) / "tokenizer")

    @staticmethod
    def load(
        model_folder: str | Path,
        dtype: torch.dtype | None = None,
        trainable: bool = False,
        variant: str | None = None,
    ) -> AnyConditioner:
        """The conditioner of a model folder, of whatever kind it is: see `load_conditioner`."""
        return load_conditioner(model_folder, dtype, trainable, variant)


AnyConditioner = Conditioner | ClassConditioner | Unconditional


def load_conditioner(
    model_folder: str | Path, dtype: torch.dtype | None = None, trainable: bool = False, variant: str | None = None
) -> AnyConditioner:
    """Reads text_encoder/ (bert/ in diffusers' LDMTextToImage folders) and tokenizer/, with no network.

    Args:
        dtype: of the weights in memory; None is float32, whatever the file holds.
        trainable: lets gradients through.
        variant: "fp16" for model.fp16.safetensors; None takes the plain file, or the only variant there is.

    Raises:
        FileNotFoundError, ValueError: in one line naming the folder and what is wrong in it.
    """
    folder = Path(model_folder)
    encoder = next((folder / name for name in ENCODERS if (folder / name).is_dir()), None)
    if encoder is None and is_unconditional(folder):
        return Unconditional()
    encoder = encoder or folder / ENCODERS[0]
    if read_config(encoder)["model_type"] == CLASSES:
        return load_classes(encoder, dtype, trainable, variant)
    return _assemble(encoder, folder / "tokenizer", ConditionerConfig(), dtype, trainable, variant)


def build_conditioner(
    config: ConditionerConfig, captions: Iterable[str] | None = None, *, seed: int = 0
) -> Conditioner:
    """The conditioner that a config asks for.

    Args:
        captions: what the BPE of "scratch" is learnt from.
        seed: of the random weights of "scratch".

    Raises:
        ValueError, FileNotFoundError: in one line naming value, rule and mend.
    """
    if config.layer not in LAYERS:
        raise ValueError(f"layer {config.layer!r} is unknown; use one of {', '.join(LAYERS)}")
    if config.kind == "scratch":
        if captions is None:
            raise ValueError("a text transformer from scratch needs captions to learn its tokenizer from")
        tokenizer = train_tokenizer(captions, config.scratch.vocab_size, config.scratch.max_length)
        encoder = random_transformer(config.scratch, tokenizer, seed)
        return Conditioner(tokenizer, encoder, bool(config.use_mask), trainable=True)
    if not config.name:
        raise ValueError(f"conditioner kind {config.kind!r} needs `name`: a folder, hub name or open_clip architecture")
    if config.kind == "open_clip":
        layers = LAYERS[config.layer]
        tokenizer, encoder = build_open_clip(
            config.name, config.pretrained, layers, config.final_norm, config.max_length
        )
        return Conditioner(tokenizer, encoder, _use_mask(config.use_mask, encoder.config))
    if config.kind != "transformers":
        raise ValueError(f"conditioner kind {config.kind!r} is unknown; use one of transformers, open_clip, scratch")
    if not config.final_norm:
        raise ValueError("final_norm: false is for open_clip only; a transformers model applies its own final norm")
    return _assemble(*find_encoder(config.name), config)


def _assemble(
    encoder_folder: Path,
    tokenizer_folder: Path,
    wanted: ConditionerConfig,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    variant: str | None = None,
) -> Conditioner:
    """A conditioner out of two local folders."""
    config = read_config(encoder_folder)
    longest = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    layouts = read_layout_tokenizer(tokenizer_folder)
    tokenizer = layouts or read_tokenizer(tokenizer_folder, wanted.max_length, longest)
    if config["model_type"] == OPEN_CLIP:
        encoder = load_open_clip(encoder_folder, dtype, variant)
    else:
        encoder = load_encoder(encoder_folder, dtype, LAYERS[wanted.layer], variant)
    return Conditioner(tokenizer, encoder, _use_mask(wanted.use_mask, config), trainable)


def _use_mask(wanted: bool | None, config: dict[str, Any]) -> bool:
    """The user's choice, else the stored one, else the habit of the encoder's kind."""
    stored = config.get("use_attention_mask")
    habit = config["model_type"] not in UNMASKED or bool(config.get("tower_config"))
    return next(choice for choice in (wanted, stored, habit) if choice is not None)


def _width(config: dict[str, Any]) -> int:
    return config.get("hidden_size") or config["d_model"]
