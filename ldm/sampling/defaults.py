"""Default settings of images: those that a model stores, those of diffusers' pipelines, those of guidance methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ldm.formats.model_parts import ModelParts
from ldm.guidance.registry import GUIDANCES
from ldm.sampling.settings import Settings

DIFFUSERS_DEFAULTS = {"guidance_scale": 7.5, "steps": 50}
DIFFUSERS_STUDENT_DEFAULTS = {"guidance_scale": 8.5, "steps": 4}  # of networks conditioned on the guidance scale


def stored_names() -> list[str]:
    """Names of the settings of which a model stores its own default."""
    return [each.name for each in fields(Settings) if each.metadata.get("stored")]


def default_settings(parts: ModelParts) -> Settings:
    """The default settings of a model: those that it stores, or else those of diffusers' pipelines."""
    is_student = parts.unet.config.guidance_dim is not None
    defaults = parts.defaults
    if not defaults:
        sampler = parts.scheduling.sampler or Settings().sampler
        defaults = {**(DIFFUSERS_STUDENT_DEFAULTS if is_student else DIFFUSERS_DEFAULTS), "sampler": sampler}
    return Settings(**{name: defaults[name] for name in stored_names() if name in defaults})


def stored_defaults(settings: Settings) -> dict[str, Any]:
    """The part of a model's default settings that its folder stores."""
    values = {name: getattr(settings, name) for name in stored_names()}
    return {name: value for name, value in values.items() if value is not None}


def with_default_scale(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the default guidance scale of the guidance method, if it has its own and `values` has no scale."""
    method = values.get("guidance_method")
    guidance = GUIDANCES.get(method) if isinstance(method, str) else None
    defaults = {} if guidance is None or guidance.default is None else {"guidance_scale": guidance.default}
    return defaults | dict(values)
