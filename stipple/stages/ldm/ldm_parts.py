"""What a stage-2 run consists of: the model that it trains, what learns in it, and what its cache depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autoencoder import Autoencoder, open_autoencoder
from conditioning.classes.class_conditioner import ClassConditioner
from conditioning.conditioners import ConditionerConfig, build_conditioner
from conditioning.interface.conditioner import Conditioner
from conditioning.readers.combined import CombinedConditioner, files_of
from conditioning.readers.registry import READERS, build_readers
from conditioning.text.two_encoders import TwoTokenizers
from conditioning.tokenizers.tokenizer import Tokenizer
from ldm.formats.diffusers.network_kinds import KINDS, Network, folder_of
from ldm.formats.diffusers.networks_folder import empty_unet
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.formats.model_parts import ModelParts
from ldm.pipeline import TextToImage
from ldm.sampling.defaults import default_settings
from ldm.sampling.settings import Settings
from stipple.stages.ldm.distillation import scheduling_of
from stipple.stages.ldm.ldm_run import DEFAULT_SAMPLES, LdmRunConfig, opened
from stipple.stages.ldm.shapes import check_shapes
from stipple.stages.ldm.trainable import Trainable
from stipple.training.optimization.ema import Ema
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.trainer import Trainer
from stipple_core.config import require_same
from stipple_core.data.records.records import Record, Records, fingerprints
from stipple_core.files.weights import place
from stipple_core.images.drawn_pictures import model_hash
from stipple_core.latent_cache.reader import CachedLatents
from stipple_core.operators.winograd import lay_out

READS_INPUT = "conv_in.weight"
READS_SCALE = "time_embedding.cond_proj.weight"  # of UNets with a guidance_dim
MOMENTS_DTYPES = {"fp32": "float32", "fp16": "float16"}  # of RunConfig.cache_precision


def make_conditioner(config: LdmRunConfig, init: ModelParts | None, records: Records) -> Conditioner:
    """What the config names; else that of init_from, which learns on if it learnt with the UNet, and new readers.

    Raises:
        ValueError: a caption, also of a picture that is held out, is none that it can read.
    """
    captions, held_out = (captions_of(part) for part in (records.train, records.validation))
    readers = {name: getattr(config.conditioner, name) for name in READERS}
    if config.distillation is not None:
        return _frozen(init.conditioner)
    if init is None or replace(config.conditioner, **dict.fromkeys(READERS)) != ConditionerConfig():
        return build_conditioner(config.conditioner, captions, seed=config.seed, held_out=held_out)
    prompts = init.conditioner.prompts
    if isinstance(prompts, ClassConditioner) and prompts.null_class is None:
        raise ValueError(f"init_from {config.init_from} has no null class to drop captions for; give one that has")
    if not isinstance(prompts.tokenizer, Tokenizer | TwoTokenizers):
        prompts.tokenize([*captions, *held_out])  # one that is no class, or that nothing reads, is found now
    if not any(readers.values()):
        return init.conditioner
    known = {**init.conditioner.readers, **build_readers(config.conditioner, config.seed)}
    return CombinedConditioner(prompts, {name: known[name] for name in READERS if name in known})


def captions_of(records: Iterable[Record]) -> list[str]:
    """All of them."""
    return [caption for record in records for group in record.captions for caption in group]


def _frozen(conditioner: Conditioner) -> Conditioner:
    """It learns no more: what it says is to stay what the teacher was told."""
    for module in conditioner.modules():
        if hasattr(module, "trainable"):
            module.trainable = False
    return conditioner.requires_grad_(False).eval()


def make_unet(config: LdmRunConfig, init: ModelParts | None) -> Network:
    """A new UNet, or prior, with weights drawn by torch's generator, or one with those of init_from."""
    if init is None:
        return KINDS[folder_of(config.network)].build(config.network)
    shown = _shown_anew(config, init)
    free = ("sample_size", "dropout", "guidance_dim", *(["in_channels"] if shown else []))
    require_same(config.network, init.unet.config, folder_of(config.network), f"init_from {config.init_from}", free)
    unet = empty_unet(config.network)
    state = init.unet.state_dict()
    if shown:  # what it is shown besides z_t adds nothing at first (Nichol et al. 2022, GLIDE, section 2.3)
        first, wanted = state[READS_INPUT][:, : init.autoencoder.latent_channels], unet.state_dict()[READS_INPUT].shape
        state[READS_INPUT] = F.pad(first, (0, 0, 0, 0, 0, wanted[1] - first.shape[1]))
    if (weight := unet.state_dict().get(READS_SCALE)) is not None:
        state.setdefault(READS_SCALE, torch.zeros(weight.shape))  # a copy of the teacher, deaf to the scale at first
    place(unet, state, str(config.init_from))
    return unet


def _shown_anew(config: LdmRunConfig, init: ModelParts) -> bool:
    """Whether the run's network is shown something besides z_t that that of init_from is not, or in another order."""
    wanted, readers = config.conditioner.spatial, init.conditioner.readers
    if wanted is None or "spatial" not in readers:
        return wanted is not None
    known = readers["spatial"].config
    return (wanted.kind, wanted.convention) != (known.kind, known.convention)


def make_scheduling(config: LdmRunConfig, init: ModelParts | None) -> Scheduling:
    """How the trained model is to be sampled: on the config's noise levels, else as init_from."""
    learned = {"schedule": config.diffusion.schedule, "prediction": config.diffusion.prediction}
    if config.distillation is not None:
        learned |= scheduling_of(config.distillation)
    return Scheduling(**learned) if init is None else replace(init.scheduling, **learned)


def make_defaults(config: LdmRunConfig, init: ModelParts | None) -> Settings:
    """How the trained model makes pictures: by the config's samples, in all else as init_from."""
    given = Settings() if init is None else default_settings(init)
    chosen = {name: getattr(config.samples, name) for name in DEFAULT_SAMPLES}
    eta = given.eta if config.samples.sampler == given.sampler else 0.0  # which another sampler may not take
    return replace(given, eta=eta, **chosen)


def caches_contexts(config: LdmRunConfig, conditioner: Conditioner) -> bool:
    """Whether the cache holds contexts: tokens and nothing else, of an encoder that training does not change."""
    tokens_alone = conditioner.context_dim is not None and conditioner.vector_dim is None
    return config.cache_contexts and not conditioner.trainable and tokens_alone


def cache_key(
    config: LdmRunConfig, records: Sequence[Record], autoencoder: Autoencoder, conditioner: Conditioner
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


def build_model(config: LdmRunConfig, records: Records, device: torch.device) -> TextToImage:
    """Autoencoder, text encoder and UNet on their device, nothing of them trained or registered yet.

    Raises:
        ValueError: the parts do not fit together.
    """
    autoencoder = open_autoencoder(config.autoencoder).eval().requires_grad_(False)
    init = opened(config)
    conditioner = make_conditioner(config, init, records)
    check_shapes(config, autoencoder, conditioner)
    torch.manual_seed(config.seed)
    unet = lay_out(make_unet(config, init).to(device))
    unet.checkpointing = config.checkpointing
    lay_out(autoencoder.to(device))
    KINDS[folder_of(config.network)].fit(unet, autoencoder)
    defaults, scheduling = make_defaults(config, init), make_scheduling(config, init)
    return TextToImage(autoencoder, unet, conditioner.to(device), scheduling, defaults)


def open_cache(config: LdmRunConfig, records: Sequence[Record], model: TextToImage) -> CachedLatents | None:
    """The latent cache that the config names, if any. Raises as CachedLatents, also where it is of other pictures."""
    if config.cache is None:
        return None
    key = cache_key(config, records, model.autoencoder, model.conditioner)
    return CachedLatents(config.cache, key, config.seed)


@dataclass(frozen=True, kw_only=True)
class LdmTraining:
    """What learns in a stage-2 run."""

    trainer: Trainer
    model: TextToImage
    modules: list[nn.Module]  # of it: the UNet, the text encoder, or both
    network: nn.Module  # the UNet, wrapped for several processes where it learns
    text_network: nn.Module  # the text encoder, the same
    averages: list[Ema]  # one for each module
    optimizer: Optimizer

    @classmethod
    def register(
        cls,
        trainer: Trainer,
        model: TextToImage,
        config: LdmRunConfig,
        learning: Trainable,
        followers: Sequence[Ema] = (),
    ) -> LdmTraining:
        """Give the trainer all that it is to save and restore; `followers` are the objective's own averages."""
        modules, network, text_network = [], model.unet, model.conditioner
        if learning.base is not None:
            trainer.watch("model that is adapted", learning.base)
        for path in files_of(model.conditioner):
            trainer.watch("database", model_hash(path))
        if any(p.requires_grad for p in model.unet.parameters()):
            modules.append(model.unet)
            network = trainer.network("unet", model.unet, may_partition=learning.base is None)
        else:  # in the run's precision, too
            network = trainer.accelerator.prepare_model(model.unet, evaluation_mode=True)
        if model.conditioner.trainable:
            modules.append(model.conditioner)
            if model.conditioner.tokenizer is not None:
                trainer.keep("tokenizer", model.conditioner.tokenizer)  # learnt from captions, which may change
            text_network = trainer.network("conditioner", model.conditioner, may_partition=learning.base is None)
        averages = [Ema(module, config.ema) for module in modules]
        optimizer = trainer.optimizer("optimizer", modules, config.optimizer, [*averages, *followers])
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
        copies, model = {module: self.trainer.whole(module, saved) for module in self.modules}, self.model
        if None in copies.values():
            return None
        unet, conditioner = (copies.get(part, part) for part in (model.unet, model.conditioner))
        return TextToImage(model.autoencoder, unet.eval(), conditioner.eval(), model.scheduling, model.defaults)
