"""The UNets of the paper and of Stable Diffusion."""

from __future__ import annotations

from ldm.networks.unet_config import UNetConfig

LATENTS = {"in_channels": 3, "out_channels": 3}  # of f = 4
FOUR = {"block_out_channels": (192, 384, 576, 960), "attention_levels": (False, True, True, True), **LATENTS}
ALONE = {"attention": "plain", "cross_attention_dim": None}
PUBLISHED = {  # config, and parameters in millions
    "text-to-image": (UNetConfig(), 872.300484),
    "SD1": (UNetConfig(cross_attention_dim=768, sample_size=64), 859.520964),
    "SD1 inpainting": (UNetConfig(cross_attention_dim=768, sample_size=64, in_channels=9), 859.535364),
    "SD2": (
        UNetConfig(
            cross_attention_dim=1024, use_linear_projection=True, attention_heads=(5, 10, 20, 20), sample_size=64
        ),
        865.910724,
    ),
    "ImageNet, f = 8": (
        UNetConfig(
            block_out_channels=(256, 512, 1024),
            attention_levels=(True, True, True),
            attention_heads=(8, 16, 32),
            cross_attention_dim=512,
        ),
        395.0,
    ),
    "ImageNet": (UNetConfig(attention_heads=(1,), cross_attention_dim=512, sample_size=64, **FOUR), 400.9),
    "smaller text-to-image": (
        UNetConfig(attention_heads=(6, 12, 18, 30), cross_attention_dim=640, sample_size=64, **FOUR),
        403.6,
    ),
    "layout": (
        UNetConfig(
            sample_size=64,
            block_out_channels=(128, 256, 384, 512),
            attention_levels=(False, True, True, True),
            attention_heads=(4, 8, 12, 16),
            cross_attention_dim=512,
            transformer_layers=3,
            **LATENTS,
        ),
        246.3,
    ),
    "retrieval": (
        UNetConfig(
            sample_size=48,
            in_channels=16,
            out_channels=16,
            block_out_channels=(448, 896, 1344, 1792),
            attention_heads=(14, 28, 42, 56),
            cross_attention_dim=768,
        ),
        1335.480400,
    ),
    "CelebA-HQ, FFHQ, bedrooms": (
        UNetConfig(
            sample_size=64,
            block_out_channels=(224, 448, 672, 896),
            attention_levels=(False, True, True, True),
            attention_heads=(7, 14, 21, 28),
            **ALONE,
            **LATENTS,
        ),
        274.1,
    ),
    "churches": (
        UNetConfig(
            block_out_channels=(192, 384, 384, 768, 768),
            attention_levels=(True, True, True, True, False),
            resample="residual",
            scale_shift=True,
            **ALONE,
        ),
        295.0,
    ),
    "inpainting": (
        UNetConfig(
            sample_size=64,
            block_out_channels=(256, 512, 768, 1024),
            attention_levels=(False, True, True, True),
            resample="residual",
            **ALONE,
            **LATENTS | {"in_channels": 7},
        ),
        387.2,
    ),
    "semantic": (
        UNetConfig(
            sample_size=64,
            block_out_channels=(128, 512, 1024),
            attention_levels=(False, False, False),
            **ALONE,
            **LATENTS | {"in_channels": 6},
        ),
        215.2,
    ),
    "super-resolution": (
        UNetConfig(
            sample_size=64,
            block_out_channels=(160, 320, 320, 640),
            attention_levels=(False, False, False, True),
            attention_heads=(5, 10, 10, 20),
            **ALONE,
            **LATENTS | {"in_channels": 6},
        ),
        113.6,
    ),
}
