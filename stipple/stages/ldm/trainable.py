"""Which part of a model a stage-2 run trains and saves: the whole model, LoRA layers, or a new word.

LoRA: Hu et al. 2021, with the layers of peft. Textual inversion: Gal et al. 2022.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from conditioning.text.new_tokens import FILE, GrownTable, initial_rows, new_token, save_embedding
from ldm.formats.lora import ENCODER, UNET, Lora, LowRank, save_lora
from ldm.pipeline import TextToImage
from stipple_core.data.records.records import Record
from stipple_core.images.drawn_pictures import model_hash
from stipple_core.operators.winograd import lay_out
from stipple_core.randomness import generator

TEXT_TARGETS = (  # queries, keys, values and outputs of CLIP, BERT, LDM's BERT and T5
    *("q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value", "to_q", "to_k", "to_v", "to_out"),
    *("q", "k", "v", "o"),
)
USED_AS_MATRICES = ("proj_in", "proj_out")  # by `SpatialTransformer`, which does not call these layers
HALVES = {"lora_A": "down", "lora_B": "up"}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of some layers, which are trained in place of the layers' weights."""

    rank: int = 8
    alpha: float = 8.0  # the adapters are scaled by alpha / rank
    targets: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"]
    )  # ends of the names of adapted layers
    text_encoder: bool = False  # also adapt its attention

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora.rank {self.rank} must be at least 1, lora.alpha {self.alpha} above 0; 8 is usual")
        if unsupported := [target for target in self.targets if target.split(".")[-1] in USED_AS_MATRICES]:
            raise ValueError(f"lora.targets {unsupported[0]} can't be adapted; use attention (to_q, ...) or ff.net.2")
        if importlib.util.find_spec("peft") is None:
            raise ValueError("lora needs peft; pip install peft")


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """A new word of the text encoder; its embedding is all that is trained."""

    token: str  # the word, such as <toy>; some caption has to contain it
    initial: str  # a similar word; its embedding is the initial value
    vectors: int = 1  # how many tokens the word stands for

    def __post_init__(self):
        if self.vectors < 1:
            raise ValueError(f"inversion.vectors {self.vectors} must be at least 1; 1 is usual")


class Trainable(Protocol):
    """The part of a model that a run trains and saves."""

    product: str  # the folder in the run folder that it is saved to
    base: str | None  # hash of the model that it adapts; None if the whole model is trained

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Set requires_grad for this part alone. Raises ValueError if the model or the captions do not fit."""

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """Write this part to a folder."""

    def flags(self, run: str) -> list[str]:
        """The flags with which `stipple draw` opens the result of a run."""


class WholeModel:
    """The whole model: its UNet, and its conditioner if that was built to be trained."""

    product, base = "model", None

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Do nothing: models are built this way."""

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """Write a model folder in the diffusers layout."""
        model.save(folder, dtype)

    def flags(self, run: str) -> list[str]:
        """Return the flags that open the new model."""
        return ["--checkpoint", f"{run}/{self.product}"]


@dataclass(frozen=True)
class LoraLayers:
    """LoRA layers; they are saved alone, for diffusers and for programs that read Kohya's files."""

    config: LoraConfig
    source: str  # path of the model that they adapt
    product = "lora"

    @property
    def base(self) -> str:
        """The hash of the adapted model."""
        return model_hash(Path(self.source))

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Wrap the adapted layers in those of peft. B is zero, so the outputs of the model do not change."""
        _check_draws(model, "lora")
        torch.manual_seed(generator(seed, "lora").initial_seed())
        model.conditioner.requires_grad_(False)
        model.conditioner.trainable = model.conditioner.prompts.trainable = self.config.text_encoder
        self._add(model.unet, self.config.targets, "lora.targets")
        lay_out(model.unet)
        if self.config.text_encoder:
            if not hasattr(model.conditioner.prompts, "encoder"):
                raise ValueError(
                    "lora.text_encoder=true is not supported for models with two text encoders; leave it out"
                )
            encoder = model.conditioner.prompts.encoder
            self._add(encoder, [t for t in TEXT_TARGETS if _named(encoder, t)], "lora.text_encoder")

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """Write pytorch_lora_weights.safetensors and kohya.safetensors."""
        networks = {UNET: model.unet}
        if self.config.text_encoder:
            networks[ENCODER] = model.conditioner.prompts.encoder
        layers = {(network, name): low for network in networks for name, low in self._layers(networks[network])}
        save_lora(Lora(layers), folder, dtype)

    def flags(self, run: str) -> list[str]:
        """Return the flags that open the adapted model with the LoRA layers."""
        return ["--checkpoint", self.source, "--lora", f"{run}/{self.product}:1"]

    def _add(self, network: nn.Module, targets: Iterable[str], where: str) -> None:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        targets = list(targets)
        if absent := [target for target in targets if not _named(network, target)] or targets == []:
            wrong = f"no layer's name ends in {absent[0]}" if targets else "there are no layers to adapt"
            raise ValueError(f"{where}: {wrong}; use names such as to_q, to_k, to_v, to_out.0")
        rank, alpha = self.config.rank, self.config.alpha
        inject_adapter_in_model(PeftConfig(r=rank, lora_alpha=alpha, target_modules=targets), network)

    def _layers(self, network: nn.Module) -> Iterator[tuple[str, LowRank]]:
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for name, p in network.named_parameters():
            if p.requires_grad:  # LAYER.lora_A.default.weight
                layer, half = name.rsplit(".", 3)[:2]
                halves.setdefault(layer.removeprefix("model."), {})[HALVES[half]] = p.detach()
        return ((layer, LowRank(**pair, alpha=self.config.alpha)) for layer, pair in halves.items())


@dataclass(frozen=True)
class TextualInversion:
    """A new word of the text encoder (textual inversion); its embeddings are saved alone."""

    config: InversionConfig
    source: str  # path of the model that it is for
    product = "embedding"

    @property
    def base(self) -> str:
        """The hash of the adapted model."""
        return model_hash(Path(self.source))

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Add rows for the word to the token embeddings. Raises ValueError if no caption contains it."""
        _check_draws(model, "inversion")
        token, prompts = self.config.token, model.conditioner.prompts
        if not any(token in caption for record in records for group in record.captions for caption in group):
            raise ValueError(f"no caption contains inversion.token {token}; add it to a template of data.captions")
        rows = initial_rows(prompts, self.config.initial, self.config.vectors)
        model.unet.requires_grad_(False).eval()
        model.conditioner.requires_grad_(False)
        new_token(prompts, token, rows)  # after everything else was frozen
        model.conditioner.trainable = prompts.trainable = True

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """Write learned_embeds.safetensors."""
        table = next(module for module in model.conditioner.modules() if isinstance(module, GrownTable))
        folder.mkdir(parents=True, exist_ok=True)
        save_embedding(self.config.token, table.rows.detach().to(dtype), folder)

    def flags(self, run: str) -> list[str]:
        """Return the flags that open the model with the new word."""
        return ["--checkpoint", self.source, "--embedding", f"{run}/{self.product}/{FILE}"]


def make_trainable(lora: LoraConfig | None, inversion: InversionConfig | None, source: str | None) -> Trainable:
    """Choose what a run trains. Raises ValueError if settings exclude each other or there is no model to adapt."""
    if lora is None and inversion is None:
        return WholeModel()
    if lora is not None and inversion is not None:
        raise ValueError("lora and inversion are both set; train the word first, then set one of them (lora=null)")
    if source is None:
        name = "lora" if lora is not None else "inversion"
        raise ValueError(f"{name} adapts a model, and init_from has no value; set init_from=PATH")
    return LoraLayers(lora, source) if lora is not None else TextualInversion(inversion, source)


def _check_draws(model: TextToImage, how: str) -> None:
    """Raise ValueError for a prior, which no command can use with adapters."""
    if not model.autoencoder.decodes:
        raise ValueError(f"{how} adapts models that draw images, and this one makes embeddings; train the whole model")


def _named(network: nn.Module, target: str) -> bool:
    """Whether peft would find a layer whose name ends in `target`."""
    return any(name == target or name.endswith(f".{target}") for name, _ in network.named_modules())
