"""Checks of prompts before anything is drawn: too long, unreadable, or ignored by the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ldm.sampling.model import Model
from ldm.sampling.settings import Settings


def check_prompts(model: Model, picture: Settings, prompts: Sequence[str]) -> None:
    """Raise ValueError for prompts that the conditioner can't tokenize; warn of those that are too long."""
    others = [prompt for prompt, _ in picture.prompts()[1:]]
    texts = dict.fromkeys([*prompts, *others, *([picture.negative_prompt] if model.reads_null(picture) else [])])
    model.conditioner.tokenize([*texts])  # raises, also for text that names no class or layout
    for text in texts:
        if cut := model.conditioner.cut(text):
            limit = model.conditioner.max_length
            warnings.warn(f"a prompt is longer than {limit} tokens; not seen by the model: {cut!r}", stacklevel=4)


def check_ignored_prompts(model: Model, picture: Settings, prompts: Sequence[str]) -> None:
    """Raise ValueError for prompts that a model conditioned on image embeddings alone would ignore."""
    if (model.conditioner.prompts.context_dim, model.conditioner.prompts.vector_dim) != (None, None):
        return
    if picture.negative_prompt.strip() and model.reads_null(picture):
        rule = "is read by nothing in this model, whose guidance moves away from no condition; leave it out"
        raise ValueError(f"negative prompt {picture.negative_prompt!r:.80} {rule}")
    if len(picture.prompts()) > 1 and model.prior is not None:
        raise ValueError(f"also {picture.also!r:.80} is not read by a prior, which makes one embedding; leave it out")
    if picture.image is not None and any(prompt.strip() for prompt in prompts):
        rule = "can't both be used: the model is conditioned on one of them; leave one out"
        raise ValueError(f"prompt {max(prompts, key=len)!r:.80} and an image {rule}")
