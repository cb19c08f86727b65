"""Small random text-to-image models of each kind, with autoencoder, UNet, text encoder and schedule."""

from pathlib import Path

import torch

from autoencoder import Autoencoder, AutoencoderConfig
from conditioning import ConditionerConfig, build_conditioner
from conditioning.interface.conditioner import Conditioner
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.pipeline import TextToImage
from ldm.sampling.settings import Settings
from ldm.schedules.noise_schedule import ScheduleConfig
from tests.helpers.models.small_encoders import build_scratch, save_bert

SIDE = 32  # pixels, the default image size
VAE = dict(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=SIDE)
UNET = dict(
    sample_size=SIDE // 4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(True, True),
    attention_heads=(4,),
    norm_num_groups=8,
)
VP = ScheduleConfig(beta_start=0.00085, beta_end=0.012)
DEFAULTS = Settings(guidance_scale=3.0, steps=4, sampler="dpmpp_2m")


def build_model(
    folder: Path, regularizer: str = "kl", encoder: str = "clip", prediction: str = "noise", **schedule
) -> TextToImage:
    """Build a model in evaluation mode. `folder` is for its text encoder."""
    clip = encoder == "clip"
    conditioner = build_scratch() if clip else build_conditioner(ConditionerConfig(name=str(save_bert(folder))))
    return build_model_of(conditioner, regularizer, prediction, **schedule)


def build_model_of(
    conditioner: Conditioner, regularizer: str = "kl", prediction: str = "noise", **schedule
) -> TextToImage:
    """Build a model with a conditioner in evaluation mode."""
    torch.manual_seed(1)
    autoencoder = Autoencoder(AutoencoderConfig(regularizer=regularizer, codebook_size=64, **VAE))
    dims = dict(cross_attention_dim=conditioner.context_dim, vector_dim=conditioner.vector_dim)
    unet = UNet(UNetConfig(in_channels=4 + conditioner.latent_channels, **dims, **UNET))
    for name, parameter in unet.named_parameters():  # also zero-initialized layers; larger values for cross-attention
        gain = 3.0 if "attn2" in name else 1.0
        std = 0.1 if parameter.ndim == 1 else gain * parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, std=std)
    if regularizer == "vq":
        autoencoder.quantize.embedding.weight.data.normal_()
    autoencoder.set_scale(0.1, 0.5)
    config = ScheduleConfig(**schedule) if schedule else VP
    conditioner.requires_grad_(False)
    scheduling = Scheduling(schedule=config, prediction=prediction)
    return TextToImage(autoencoder.eval(), unet.eval(), conditioner.eval(), scheduling, DEFAULTS)
