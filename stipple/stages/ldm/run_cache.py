"""The latent cache of a stage-2 run, and the settings and data that it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from autoencoder import Autoencoder
from conditioning.interface.conditioner import Conditioner
from ldm.pipeline import TextToImage
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.data.records.records import Record, fingerprints
from stipple_core.latent_cache.reader import CachedLatents

MOMENTS_DTYPES = {"fp32": "float32", "fp16": "float16"}  # of LdmRunConfig.cache_precision


def caches_contexts(config: LdmRunConfig, conditioner: Conditioner) -> bool:
    """Whether the cache holds contexts: only tokens without a vector, of an encoder that is not trained."""
    tokens_alone = conditioner.context_dim is not None and conditioner.vector_dim is None
    return config.cache_contexts and not conditioner.trainable and tokens_alone


def cache_key(
    config: LdmRunConfig, records: Sequence[Record], autoencoder: Autoencoder, conditioner: Conditioner
) -> dict[str, Any]:
    """Everything that cached latents and contexts depend on."""
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


def open_cache(config: LdmRunConfig, records: Sequence[Record], model: TextToImage) -> CachedLatents | None:
    """Open the latent cache that the config names, if any.

    Raises:
        ValueError: as `CachedLatents`; also if the cache was made of other images or by another autoencoder.
    """
    if config.cache is None:
        return None
    key = cache_key(config, records, model.autoencoder, model.conditioner)
    return CachedLatents(config.cache, key, config.seed)
