"""Builds the model that a stage-2 run trains, from its config and from the model that it starts from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from autoencoder import FirstStage, open_autoencoder
from conditioning.classes.class_conditioner import ClassConditioner
from conditioning.conditioners import ConditionerConfig, build_conditioner
from conditioning.interface.conditioner import Conditioner
from conditioning.readers.combined import CombinedConditioner
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
from stipple.stages.ldm.ldm_run import DEFAULT_SAMPLES, LdmRunConfig
from stipple.stages.ldm.shapes import check_shapes
from stipple_core.config import require_same
from stipple_core.data.records.records import Record, Records
from stipple_core.files.weights import place
from stipple_core.operators.winograd import lay_out

FIRST_CONVOLUTION = "conv_in.weight"
SCALE_EMBEDDING = "time_embedding.cond_proj.weight"  # of UNets with a guidance_dim


def build_model(config: LdmRunConfig, init: ModelParts | None, records: Records, device: torch.device) -> TextToImage:
    """Build autoencoder, conditioner and network on their device; nothing is trained or registered yet.

    Args:
        config: of the run.
        init: the model of `init_from`, opened; the built model shares the memory of its weights where possible.
        records: the images whose captions the conditioner has to read.
        device: of the built model.

    Raises:
        ValueError: the parts do not fit together.
    """
    autoencoder = make_autoencoder(config, init)
    conditioner = make_conditioner(config, init, records)
    check_shapes(config, autoencoder, conditioner)
    torch.manual_seed(config.seed)
    unet = lay_out(make_unet(config, init).to(device))
    unet.checkpointing = config.checkpointing
    lay_out(autoencoder.to(device))
    KINDS[folder_of(config.network)].fit(unet, autoencoder)
    defaults, scheduling = make_defaults(config, init), make_scheduling(config, init)
    return TextToImage(autoencoder, unet, conditioner.to(device), scheduling, defaults)


def make_autoencoder(config: LdmRunConfig, init: ModelParts | None) -> FirstStage:
    """Open the frozen autoencoder; that of `init_from` is open already."""
    if init is not None and config.autoencoder == config.init_from and Path(config.init_from).is_dir():
        autoencoder = init.autoencoder
    else:
        autoencoder = open_autoencoder(config.autoencoder)
    return autoencoder.eval().requires_grad_(False)


def make_conditioner(config: LdmRunConfig, init: ModelParts | None, records: Records) -> Conditioner:
    """Build the conditioner of the config; without one, extend that of `init_from` by the readers of the config.

    A text encoder of `init_from` that was trained with its UNet is trained again.

    Raises:
        ValueError: the conditioner can't read a caption, of a training image or of a held-out one.
    """
    captions, held_out = (captions_of(part) for part in (records.train, records.validation))
    if config.distillation is not None:
        return _frozen(init.conditioner)
    if init is None or replace(config.conditioner, **dict.fromkeys(READERS)) != ConditionerConfig():
        return build_conditioner(config.conditioner, captions, seed=config.seed, held_out=held_out)
    prompts = init.conditioner.prompts
    if isinstance(prompts, ClassConditioner) and prompts.null_class is None:
        raise ValueError(f"init_from {config.init_from} has no null class to drop captions for; use one that has")
    if not isinstance(prompts.tokenizer, Tokenizer | TwoTokenizers):
        prompts.tokenize([*captions, *held_out])  # raises now for a caption that is not a class, or that is not read
    if not any(getattr(config.conditioner, name) for name in READERS):
        return init.conditioner
    readers = {**init.conditioner.readers, **build_readers(config.conditioner, config.seed)}
    return CombinedConditioner(prompts, {name: readers[name] for name in READERS if name in readers})


def captions_of(records: Iterable[Record]) -> list[str]:
    """All captions of all records."""
    return [caption for record in records for group in record.captions for caption in group]


def _frozen(conditioner: Conditioner) -> Conditioner:
    """Freeze a conditioner, so that the student is conditioned as its teacher was."""
    for module in conditioner.modules():
        if hasattr(module, "trainable"):
            module.trainable = False
    return conditioner.requires_grad_(False).eval()


def make_unet(config: LdmRunConfig, init: ModelParts | None) -> Network:
    """Build the UNet or prior: with the weights of `init_from`, or with random ones from torch's generator."""
    if init is None:
        return KINDS[folder_of(config.network)].build(config.network)
    new_inputs = _has_new_inputs(config, init)
    free = ("sample_size", "dropout", "guidance_dim", *(["in_channels"] if new_inputs else []))
    require_same(config.network, init.unet.config, folder_of(config.network), f"init_from {config.init_from}", free)
    unet, state = empty_unet(config.network), init.unet.state_dict()
    if config.distillation is not None:  # the teacher keeps its own weights
        state = {name: weight.clone() for name, weight in state.items()}
    if new_inputs:  # input channels besides z_t have no effect at first (Nichol et al. 2022, GLIDE, section 2.3)
        weight, channels = state[FIRST_CONVOLUTION], init.autoencoder.latent_channels
        missing = unet.state_dict()[FIRST_CONVOLUTION].shape[1] - channels
        state[FIRST_CONVOLUTION] = F.pad(weight[:, :channels], (0, 0, 0, 0, 0, missing))
    if (weight := unet.state_dict().get(SCALE_EMBEDDING)) is not None:
        state.setdefault(SCALE_EMBEDDING, torch.zeros(weight.shape))  # the guidance scale has no effect at first
    place(unet, state, str(config.init_from))
    return unet


def _has_new_inputs(config: LdmRunConfig, init: ModelParts) -> bool:
    """Whether the network reads channels besides z_t that the network of `init_from` does not, or in another order."""
    spatial, readers = config.conditioner.spatial, init.conditioner.readers
    if spatial is None or "spatial" not in readers:
        return spatial is not None
    before = readers["spatial"].config
    return (spatial.kind, spatial.convention) != (before.kind, before.convention)


def make_scheduling(config: LdmRunConfig, init: ModelParts | None) -> Scheduling:
    """How the trained model is sampled: with the noise levels and prediction of the config, else as `init_from`."""
    trained = {"schedule": config.diffusion.schedule, "prediction": config.diffusion.prediction}
    if config.distillation is not None:
        trained |= scheduling_of(config.distillation)
    return Scheduling(**trained) if init is None else replace(init.scheduling, **trained)


def make_defaults(config: LdmRunConfig, init: ModelParts | None) -> Settings:
    """The default settings of the trained model: those of `samples` in the config, the rest as in `init_from`."""
    defaults = Settings() if init is None else default_settings(init)
    samples = {name: getattr(config.samples, name) for name in DEFAULT_SAMPLES}
    eta = defaults.eta if config.samples.sampler == defaults.sampler else 0.0  # another sampler may not support it
    return replace(defaults, eta=eta, **samples)
