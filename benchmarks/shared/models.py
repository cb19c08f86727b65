"""The models of the benchmarks in both libraries: Stable Diffusion 1.5's shapes, and tiny ones, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.formats.diffusers_autoencoder import to_diffusers
from benchmarks.peers.diffusers_calls import SCALE
from conditioning.encoders.clip import clip_config
from ldm.formats.diffusers.unet_options import unet_to_diffusers
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from stipple_core.operators.winograd import lay_out

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
TINY_CLIP = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
CLIP_WORDS = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407)
TINY_UNET = dict(block_out_channels=(32, 64), layers_per_block=1, attention_levels=(True, True), norm_num_groups=8)


@dataclass(frozen=True)
class Shapes:
    """A latent diffusion model without weights."""

    name: str
    unet: UNetConfig
    vae: AutoencoderConfig
    text: dict[str, Any]  # contents of config.json of the text encoder


SD = Shapes(
    "sd15",
    UNetConfig(sample_size=64, cross_attention_dim=768),
    AutoencoderConfig(sample_size=512),
    clip_config({"model_type": "clip_text_model"} | CLIP_WORDS | CLIP_L),
)
TINY = Shapes(
    "tiny",
    UNetConfig(sample_size=8, cross_attention_dim=64, attention_heads=(4,), **TINY_UNET),
    AutoencoderConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16),
    clip_config({"model_type": "clip_text_model"} | CLIP_WORDS | TINY_CLIP),
)


def shapes(tiny: bool) -> Shapes:
    """Return the shapes of SD 1.5, or tiny ones."""
    return TINY if tiny else SD


def empty(build: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """Create a module on the meta device, where it takes neither memory nor time."""
    with torch.device("meta"):
        return build(*arguments)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return random weights, also for layers that begin with zeros; they depend on names and shapes only."""
    module = module.to_empty(device="cpu") if next(module.parameters()).is_meta else module
    draws = torch.Generator().manual_seed(seed)
    for name, weight in sorted(module.named_parameters()):
        if weight.ndim > 1:
            bound = (3 / weight[0].numel()) ** 0.5
            weight.uniform_(-bound, bound, generator=draws)
        else:
            middle = 1.0 if name.endswith("weight") else 0.0
            weight.uniform_(middle - 0.1, middle + 0.1, generator=draws)
    return module


def their_unet(config: UNetConfig) -> nn.Module:
    """Create diffusers' UNet2DConditionModel with these shapes on the meta device."""
    from diffusers import UNet2DConditionModel

    return empty(UNet2DConditionModel.from_config, unet_to_diffusers(config)).eval()


def their_vae(config: AutoencoderConfig) -> nn.Module:
    """Create diffusers' AutoencoderKL with these shapes on the meta device."""
    from diffusers import AutoencoderKL

    return empty(AutoencoderKL.from_config, to_diffusers(config)).eval()


def sharing(module: nn.Module, weights: dict[str, Tensor], channels_last: bool = False) -> nn.Module:
    """Assign weights to a module on the meta device without a copy, except for channels-last convolutions."""
    module.load_state_dict(weights, assign=True)
    module.eval().requires_grad_(False)
    return module.to(memory_format=torch.channels_last) if channels_last else module


def our_unet(config: UNetConfig, weights: dict[str, Tensor]) -> UNet:
    """Return Stipple's UNet with these weights, laid out as by `TextToImage.load`."""
    return lay_out(sharing(empty(UNet, config), weights))


def our_vae(config: AutoencoderConfig, weights: dict[str, Tensor]) -> Autoencoder:
    """Return Stipple's autoencoder with these weights, laid out as by `TextToImage.load`."""
    autoencoder = lay_out(sharing(empty(Autoencoder, config), weights))
    autoencoder.scaling_factor = SCALE
    return autoencoder


def count_flops(run: Callable[[], Any]) -> int:
    """Count the floating-point operations of a call with tensors on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()
