"""UNets of diffusers that are equal to `ldm.networks.unet.UNet`, and the options of which this is tested."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel, UNet2DModel

from ldm.formats.diffusers.unet_options import unet_to_diffusers
from ldm.networks.unet import UNet
from tests.helpers.models.small_unets import PLAIN, SMALL

SHAPES = {
    "LDM": SMALL,
    "SD2": replace(SMALL, use_linear_projection=True),
    "deep transformers": replace(SMALL, transformer_layers=3, layers_per_block=2),
    "attention on coarse levels": replace(
        SMALL, block_out_channels=(32, 64, 96), attention_levels=(False, True, True), attention_heads=(8,)
    ),
    "no attention but in the middle": replace(SMALL, attention_levels=(False, False)),
    "no context": replace(SMALL, cross_attention_dim=None),
    "one level": replace(SMALL, block_out_channels=(32,), attention_levels=(True,), attention_heads=(4,)),
    "vector and latents": replace(SMALL, vector_dim=6, in_channels=7),
    "scale and shift": replace(SMALL, scale_shift=True, norm_eps=1e-3),
    "plain": replace(PLAIN, resample="conv", scale_shift=False, layers_per_block=2, attention_heads=(2, 4)),
    "plain, residual": replace(PLAIN, scale_shift=False, attention_levels=(True, True), attention_heads=(4, 8)),
    "plain, residual, scale and shift": replace(PLAIN, norm_eps=1e-3, in_channels=7),
    "plain in the middle": replace(PLAIN, attention_levels=(False, False), resample="conv"),
    "plain, one level": replace(
        PLAIN, block_out_channels=(32,), attention_levels=(True,), attention_heads=(4,), resample="conv"
    ),
}


def diffusers_unet(unet: UNet) -> UNet2DConditionModel | UNet2DModel:
    """The network of diffusers with the same options and weights."""
    kind = UNet2DModel if unet.config.attention == "plain" else UNet2DConditionModel
    network = kind(**unet_to_diffusers(unet.config))
    network.load_state_dict(unet.state_dict(), strict=True)
    return network.train()


def run_diffusers(network: UNet2DConditionModel | UNet2DModel, z_t, timestep, context) -> torch.Tensor:
    """The output of a network of diffusers for a context of `ldm`."""
    sample = z_t if context.latents is None else torch.cat([z_t, context.latents], dim=1)
    if isinstance(network, UNet2DModel):
        return network(sample, timestep).sample
    dim = network.config.time_cond_proj_dim
    options = {"class_labels": context.vector, "encoder_attention_mask": context.mask}
    if dim is not None:
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        options["timestep_cond"] = embed(None, context.guidance - 1, dim)
    return network(sample, timestep, context.tokens, **options).sample
