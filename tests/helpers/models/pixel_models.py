"""A small model in pixel space, with random weights."""

from __future__ import annotations

import torch

from autoencoder import Pixels
from conditioning.classes.class_conditioner import Unconditional
from ldm import TextToImage
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.sampling.settings import Settings
from ldm.schedules.noise_schedule import ScheduleConfig

PIXEL_UNET = UNetConfig(
    sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, attention="plain",
    attention_levels=(False, True), attention_heads=(1,), cross_attention_dim=None, norm_num_groups=4,
)  # fmt: skip


def pixel_model(sampler: str = "ddim", **settings) -> TextToImage:
    """An unconditional model of 16 x 16 pixels with these default settings."""
    torch.manual_seed(0)
    unet = UNet(PIXEL_UNET)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.2)
    scheduling = Scheduling(schedule=ScheduleConfig(name="linear"), prediction="noise", sampler=sampler)
    defaults = Settings(sampler=sampler, steps=4, guidance_scale=1.0, **settings)
    return TextToImage(Pixels().eval(), unet.eval(), Unconditional(), scheduling, defaults)
