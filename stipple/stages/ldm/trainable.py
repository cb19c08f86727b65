"""What of a model learns in a stage-2 run, and what is saved of it: all, low-rank additions, or a new word.

LoRA: Hu et al. 2021, layers of peft; textual inversion: Gal et al. 2022.
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
READ_AS_MATRICES = ("proj_in", "proj_out")  # by `SpatialTransformer`, which does not call them
HALVES = {"lora_A": "down", "lora_B": "up"}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank additions to the weights of some layers, which learn in their place."""

    rank: int = 8
    alpha: float = 8.0  # the additions are scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # how names of layers end
    text_encoder: bool = False  # its attention, too

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora.rank {self.rank} must be at least 1, lora.alpha {self.alpha} above 0; 8 is usual")
        if unread := [target for target in self.targets if target.split(".")[-1] in READ_AS_MATRICES]:
            raise ValueError(f"lora.targets {unread[0]} can't be adapted; use attention (to_q, ...) or ff.net.2")
        if importlib.util.find_spec("peft") is None:
            raise ValueError("lora needs peft; pip install peft")


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """A new word of the text encoder, which alone learns."""

    token: str  # the word, such as <toy>; captions have to hold it
    initial: str  # a word that is near, whose embedding is the first guess
    vectors: int = 1  # how many tokens it stands for

    def __post_init__(self):
        if self.vectors < 1:
            raise ValueError(f"inversion.vectors {self.vectors} must be at least 1, which is usual")


class Trainable(Protocol):
    """What of a model learns, and what is saved of it."""

    product: str  # folder in the run folder that it is saved to
    base: str | None  # what the rest of the model is known by

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Let that learn (requires_grad) and nothing else. Raises ValueError."""

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """Write it to a folder."""

    def flags(self, run: str) -> list[str]:
        """Return the flags with which `stipple draw` opens what was trained."""


class WholeModel:
    """The UNet and what of its conditioner was built to learn; saved is the whole model."""

    product, base = "model", None

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Models are built this way."""

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """A model folder in the diffusers layout."""
        model.save(folder, dtype)

    def flags(self, run: str) -> list[str]:
        """The new model."""
        return ["--checkpoint", f"{run}/{self.product}"]


@dataclass(frozen=True)
class LoraLayers:
    """Low-rank additions; saved are they alone, for diffusers and for programs that read Kohya's files."""

    config: LoraConfig
    source: str  # the model that they are for
    product = "lora"

    @property
    def base(self) -> str:
        """What tells the model from others."""
        return model_hash(Path(self.source))

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Put peft's layers around those that are adapted; B is zero, so the model is what it was."""
        _check_draws(model, "lora")
        torch.manual_seed(generator(seed, "lora").initial_seed())
        model.conditioner.requires_grad_(False)
        model.conditioner.trainable = model.conditioner.prompts.trainable = self.config.text_encoder
        self._add(model.unet, self.config.targets, "lora.targets")
        lay_out(model.unet)
        if self.config.text_encoder:
            if not hasattr(model.conditioner.prompts, "encoder"):
                raise ValueError("lora.text_encoder=true is for models with one text encoder, not two; leave it out")
            encoder = model.conditioner.prompts.encoder
            self._add(encoder, [t for t in TEXT_TARGETS if _named(encoder, t)], "lora.text_encoder")

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """pytorch_lora_weights.safetensors and kohya.safetensors."""
        networks = {UNET: model.unet}
        if self.config.text_encoder:
            networks[ENCODER] = model.conditioner.prompts.encoder
        layers = {(network, name): low for network in networks for name, low in self._layers(networks[network])}
        save_lora(Lora(layers), folder, dtype)

    def flags(self, run: str) -> list[str]:
        """The old model and the additions."""
        return ["--checkpoint", self.source, "--lora", f"{run}/{self.product}:1"]

    def _add(self, network: nn.Module, targets: Iterable[str], where: str) -> None:
        from peft import LoraConfig as Wanted
        from peft import inject_adapter_in_model

        targets = list(targets)
        if absent := [target for target in targets if not _named(network, target)] or targets == []:
            told = f"{absent[0]} is the end of no layer's name" if targets else "there is nothing to adapt"
            raise ValueError(f"{where}: {told}; name such as to_q, to_k, to_v, to_out.0")
        rank, alpha = self.config.rank, self.config.alpha
        inject_adapter_in_model(Wanted(r=rank, lora_alpha=alpha, target_modules=targets), network)

    def _layers(self, network: nn.Module) -> Iterator[tuple[str, LowRank]]:
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for name, p in network.named_parameters():
            if p.requires_grad:  # LAYER.lora_A.default.weight
                layer, half = name.rsplit(".", 3)[:2]
                halves.setdefault(layer.removeprefix("model."), {})[HALVES[half]] = p.detach()
        return ((layer, LowRank(**pair, alpha=self.config.alpha)) for layer, pair in halves.items())


@dataclass(frozen=True)
class TextualInversion:
    """A word of the text encoder; saved are its embeddings alone."""

    config: InversionConfig
    source: str  # the model that reads it
    product = "embedding"

    @property
    def base(self) -> str:
        """What tells the model from others."""
        return model_hash(Path(self.source))

    def prepare(self, model: TextToImage, records: Sequence[Record], seed: int) -> None:
        """Give the text encoder rows for the word; ValueError where no caption has it."""
        _check_draws(model, "inversion")
        token, prompts = self.config.token, model.conditioner.prompts
        if not any(token in caption for record in records for group in record.captions for caption in group):
            raise ValueError(f"no caption holds inversion.token {token}; write it into one of data.captions")
        rows = initial_rows(prompts, self.config.initial, self.config.vectors)
        model.unet.requires_grad_(False).eval()
        model.conditioner.requires_grad_(False)
        new_token(prompts, token, rows)  # after all else was frozen
        model.conditioner.trainable = prompts.trainable = True

    def save(self, model: TextToImage, folder: Path, dtype: torch.dtype | None) -> None:
        """learned_embeds.safetensors."""
        table = next(module for module in model.conditioner.modules() if isinstance(module, GrownTable))
        folder.mkdir(parents=True, exist_ok=True)
        save_embedding(self.config.token, table.rows.detach().to(dtype), folder)

    def flags(self, run: str) -> list[str]:
        """The old model and the word."""
        return ["--checkpoint", self.source, "--embedding", f"{run}/{self.product}/{FILE}"]


def make_trainable(lora: LoraConfig | None, inversion: InversionConfig | None, source: str | None) -> Trainable:
    """What a run's config names. Raises ValueError where that does not go together, or there is no model to adapt."""
    if lora is None and inversion is None:
        return WholeModel()
    if lora is not None and inversion is not None:
        raise ValueError("lora and inversion are both given; learn the word first, then give one of them (lora=null)")
    if source is None:
        name = "lora" if lora is not None else "inversion"
        raise ValueError(f"{name} adapts a model, and init_from names none; give init_from=PATH")
    return LoraLayers(lora, source) if lora is not None else TextualInversion(inversion, source)


def _check_draws(model: TextToImage, how: str) -> None:
    """Raise ValueError for a prior, which no command could use with additions."""
    if not model.autoencoder.decodes:
        raise ValueError(f"{how} adapts models that make pictures, and this one makes embeddings; train it whole")


def _named(network: nn.Module, target: str) -> bool:
    """Whether names of layers end so, as peft understands it."""
    return any(name == target or name.endswith(f".{target}") for name, _ in network.named_modules())
