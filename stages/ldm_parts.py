"""What a stage-2 run consists of: the model that it trains, what learns in it, and what its cache depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoencoder import Autoencoder
from conditioning.classes import ClassConditioner
from conditioning.conditioner import AnyConditioner, Conditioner, ConditionerConfig, build_conditioner
from ldm.interop import empty_unet
from ldm.parts import Parts
from ldm.pipeline import TextToImage
from ldm.scheduling import Scheduling
from ldm.settings import Settings
from ldm.unet import UNet
from operators.winograd import lay_out
from stages.ldm_run import DEFAULT_SAMPLES, RunConfig, opened
from storage.buckets import check_step
from storage.config import require_same
from storage.records import Record, fingerprints
from storage.shards import CachedLatents
from storage.weights import place
from training.ema import Ema
from training.optimizer import Optimizer
from training.trainer import Trainer

MOMENTS_DTYPES = {"fp32": "float32", "fp16": "float16"}  # of RunConfig.cache_precision


def make_conditioner(config: RunConfig, init: Parts | None, records: Sequence[Record]) -> AnyConditioner:
    """The text encoder that the config names; else that of init_from, which learns on if it learnt with the UNet."""
    captions = [caption for record in records for group in record.captions for caption in group]
    if init is None or config.conditioner != ConditionerConfig():
        return build_conditioner(config.conditioner, captions, seed=config.seed)
    if isinstance(init.conditioner, ClassConditioner):
        if init.conditioner.null_class is None:
            raise ValueError(f"init_from {config.init_from} has no null class to drop captions for; give one that has")
        init.conditioner.tokenize(captions)  # a caption that is no class is to be found now
    return init.conditioner


def make_unet(config: RunConfig, init: Parts | None) -> UNet:
    """A new UNet with weights drawn by torch's generator, or one with those of init_from."""
    if init is None:
        return UNet(config.unet)
    free = ("sample_size", "dropout")
    require_same(config.unet, init.unet.config, "unet", f"init_from {config.init_from}", free)
    unet = empty_unet(config.unet)
    place(unet, init.unet.state_dict(), str(config.init_from))
    return unet


def make_scheduling(config: RunConfig, init: Parts | None) -> Scheduling:
    """How the trained model is to be sampled: on the config's noise levels, else as init_from."""
    learned = {"schedule": config.diffusion.schedule, "prediction": config.diffusion.prediction}
    return Scheduling(**learned) if init is None else dataclasses.replace(init.scheduling, **learned)


def make_defaults(config: RunConfig, init: Parts | None) -> Settings:
    """How the trained model makes pictures: by the config's samples, in all else as init_from."""
    given = Settings() if init is None else init.settings
    chosen = {name: getattr(config.samples, name) for name in DEFAULT_SAMPLES}
    eta = given.eta if config.samples.sampler == given.sampler else 0.0  # which another sampler may not take
    return dataclasses.replace(given, eta=eta, **chosen)


def caches_contexts(config: RunConfig, conditioner: AnyConditioner) -> bool:
    """Whether the cache holds contexts: those of a text encoder that is being trained would be stale at once."""
    return config.cache_contexts and not conditioner.trainable


def cache_key(
    config: RunConfig, records: Sequence[Record], autoencoder: Autoencoder, conditioner: Conditioner
) -> dict[str, Any]:
    """What cached latents and contexts depend on."""
    data = config.data
    return {
        **fingerprints(records),
        "image_size": data.image_size,
        "crop": data.crop,
        "flip": data.flip,
        "background": data.background,
        "buckets": None if data.buckets is None else dataclasses.asdict(data.buckets),
        "moments_dtype": MOMENTS_DTYPES[config.cache_precision],
        "autoencoder": autoencoder.fingerprint(),
        "text_encoder": conditioner.fingerprint() if caches_contexts(config, conditioner) else None,
    }


def check_shapes(config: RunConfig, autoencoder: Autoencoder, conditioner: Conditioner) -> None:
    """Raise ValueError where the UNet does not fit between autoencoder and text encoder."""
    f, size, unet = autoencoder.downsampling, config.data.image_size, config.unet
    if size % f:
        raise ValueError(f"data.image_size {size} is not divisible by {f} (autoencoder downsampling)")
    halvings = len(unet.block_out_channels) - 1
    check_step(config.data.buckets, f * 2**halvings, "downsampling of autoencoder and UNet together")
    expected = {
        "in_channels": autoencoder.latent_channels,
        "out_channels": autoencoder.latent_channels,
        "sample_size": size // f,
        "cross_attention_dim": conditioner.context_dim,
    }
    for name, value in expected.items():
        if getattr(unet, name) != value:
            given = getattr(unet, name)
            raise ValueError(f"unet.{name} {given} does not fit autoencoder, image size and text encoder; use {value}")


def build_model(config: RunConfig, records: Sequence[Record], device: torch.device) -> TextToImage:
    """Autoencoder, text encoder and UNet on their device, nothing of them trained or registered yet.

    Raises:
        ValueError: the parts do not fit together.
    """
    autoencoder = Autoencoder.load(config.autoencoder).eval().requires_grad_(False)
    init = opened(config)
    conditioner = make_conditioner(config, init, records)
    check_shapes(config, autoencoder, conditioner)
    torch.manual_seed(config.seed)
    unet = lay_out(make_unet(config, init).to(device))
    unet.checkpointing = config.checkpointing
    lay_out(autoencoder.to(device))
    defaults, scheduling = make_defaults(config, init), make_scheduling(config, init)
    return TextToImage(autoencoder, unet, conditioner.to(device), scheduling, defaults)


def open_cache(config: RunConfig, records: Sequence[Record], model: TextToImage) -> CachedLatents | None:
    """The latent cache that the config names, if any. Raises as CachedLatents, also where it is of other pictures."""
    if config.cache is None:
        return None
    key = cache_key(config, records, model.autoencoder, model.conditioner)
    return CachedLatents(config.cache, key, config.seed)


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What learns in a stage-2 run."""

    trainer: Trainer
    model: TextToImage
    modules: list[nn.Module]  # of it: the UNet, and the text encoder where it is trained along
    network: nn.Module  # the UNet, wrapped for several processes
    text_network: nn.Module  # the text encoder, wrapped where it is trained
    averages: list[Ema]  # one for each module
    optimizer: Optimizer

    @classmethod
    def register(cls, trainer: Trainer, model: TextToImage, config: RunConfig) -> Learner:
        """Give the trainer all that it is to save and restore."""
        modules, text_network = [model.unet], model.conditioner
        network = trainer.network("unet", model.unet, may_shard=True)
        if model.conditioner.trainable:
            modules.append(model.conditioner)
            trainer.keep("tokenizer", model.conditioner.tokenizer)  # learnt from captions, which may change
            text_network = trainer.network("conditioner", model.conditioner, may_shard=True)
        averages = [Ema(module, config.ema) for module in modules]
        optimizer = trainer.optimizer("optimizer", modules, config.optimizer, averages)
        return cls(
            trainer=trainer, model=model, modules=modules, network=network, text_network=text_network,
            averages=averages, optimizer=optimizer,
        )  # fmt: skip

    @contextmanager
    def averaged(self, saved: bool = False) -> Iterator[TextToImage | None]:
        """Within the block the networks have the averaged weights, in evaluation mode; yields the model, whole.

        Every process enters it. `saved`: the model is only to be saved, see `Trainer.whole`.
        """
        with ExitStack() as stack:
            for average in self.averages:
                stack.enter_context(average.applied())
            try:
                for module in self.modules:
                    module.eval()
                yield self._whole(saved)
            finally:
                for module in self.modules:
                    module.train()

    def _whole(self, saved: bool) -> TextToImage | None:
        copies, model = [self.trainer.whole(module, saved) for module in self.modules], self.model
        if None in copies:
            return None
        unet, conditioner = copies if len(copies) == 2 else (*copies, model.conditioner)
        return TextToImage(model.autoencoder, unet.eval(), conditioner.eval(), model.scheduling, model.defaults)
