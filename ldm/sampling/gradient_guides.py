"""Guides by the gradient of a score: to a class (Dhariwal & Nichol 2021), or to a text (GLIDE, section 2.3).

A guide wraps the guided denoiser of a run, see `ldm.guidance.registry.Ingredients`; the mathematics is in
`ldm.guidance.gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.guidance.classifier_free import Denoise
from ldm.guidance.gradient import by_estimate, by_gradient
from ldm.networks.classifier import Classifier, classify, translated
from ldm.sampling.settings import Settings
from ldm.schedules.noise_schedule import Schedule
from ldm.schedules.registry import make_schedule

SHARPNESS = 100.0  # factor of cosines: CLIP's temperature after training (Radford et al. 2021, section 2.5)

GRADIENT_GUIDES = {  # settings that are the scale of a guide -> where the guide comes from
    "classifier_scale": "a classifier of noisy latents: --classifier FOLDER",
    "clip_scale": "a CLIP: --clip-guidance NAME",
}


class GradientGuide(Protocol):
    """A guide by the gradient of a score."""

    def check(self, picture: Settings) -> None:
        """Raise ValueError for an image that it can't guide."""

    def around(self, denoise: Denoise, pictures: Sequence[Settings], schedule: Schedule) -> Denoise:
        """The guided denoiser of B images."""


class ClassifierGuide:
    """Guides each image to the class that its settings name, at `classifier_scale`."""

    def __init__(self, classifier: Classifier):
        self.classifier, self.schedule = classifier, make_schedule(classifier.config.schedule)

    def check(self, picture: Settings) -> None:
        """Raise ValueError for an image of an unknown class."""
        self.classifier.config.row(picture.classifier_class or picture.prompt)

    def around(self, denoise: Denoise, pictures: Sequence[Settings], schedule: Schedule) -> Denoise:
        """By the gradient of log p(y | z_t, t) with respect to z_t, see `by_gradient`."""
        config = self.classifier.config
        with torch.inference_mode(False):  # what autograd keeps may not be made in inference mode
            rows = torch.tensor([config.row(picture.classifier_class or picture.prompt) for picture in pictures])

        def score(z_t: Tensor, t: float) -> Tensor:
            logits = classify(self.classifier, self.schedule, *translated(z_t, t, schedule, self.schedule))
            return logits.log_softmax(1).gather(1, rows.to(logits.device)[:, None])[:, 0]  # [B]

        guided = by_gradient(denoise, score, pictures[0].classifier_scale, schedule)
        return lambda z_t, t: (guided if schedule(t)[0] > 0 else denoise)(z_t, t)  # not at pure noise


class ClipGuide:
    """Guides each image to its prompt by the cosine of their embeddings, at `clip_scale`.

    It scores the decoded estimate of the clean image, so any CLIP can be used, without training on noise (Bansal et al.
    2023).

    Args:
        see: images [B, 3, H, W] in [-1, 1] -> [B, d], differentiable.
        read: texts -> [B, d].
        decode: latents [B, c, h, w] -> images.
    """

    def __init__(
        self,
        see: Callable[[Tensor], Tensor],
        read: Callable[[Sequence[str]], Tensor],
        decode: Callable[[Tensor], Tensor],
    ):
        self.see, self.read, self.decode = see, read, decode

    def check(self, picture: Settings) -> None:
        """Raise ValueError for an image without a prompt."""
        if not (picture.clip_prompt or picture.prompt).strip():
            raise ValueError("clip guidance requires a text; specify a prompt or a clip prompt")

    def around(self, denoise: Denoise, pictures: Sequence[Settings], schedule: Schedule) -> Denoise:
        """By the gradient of the cosine with respect to the estimate of z_0, see `by_estimate`."""
        with torch.inference_mode(False), torch.no_grad():
            texts = self.read([picture.clip_prompt or picture.prompt for picture in pictures])

        def score(z_0: Tensor, t: float) -> Tensor:
            seen = self.see(self.decode(z_0))
            return SHARPNESS * torch.cosine_similarity(seen, texts.to(seen))  # [B]

        return by_estimate(denoise, score, pictures[0].clip_scale, schedule, through=False)
