"""What leads a picture by the gradient of a score: to a class (Dhariwal & Nichol 2021), to a text (GLIDE, section 2.3).

A lead is put around the guided denoiser of a run, see `guidances.Ingredients`; the mathematics is that of
`guidance_by_gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.guidance.base import Denoise
from ldm.guidance.gradient import by_estimate, by_gradient
from ldm.networks.classifier import Classifier, classify, translated
from ldm.sampling.settings import Settings
from ldm.schedules.base import Schedule
from ldm.schedules.registry import make_schedule

SHARPNESS = 100.0  # of cosines: what CLIP's own temperature comes to in training (Radford et al. 2021, section 2.5)

GRADIENT_GUIDES = {  # fields of `Settings` that are the scale of a lead, and what gives a model that lead
    "classifier_scale": "a classifier of noisy latents: --classifier FOLDER",
    "clip_scale": "a CLIP: --clip-guidance NAME",
}


class GradientGuide(Protocol):
    """What leads pictures somewhere."""

    def check(self, picture: Settings) -> None:
        """Raise ValueError for a picture that it can't lead."""

    def around(self, denoise: Denoise, pictures: Sequence[Settings], schedule: Schedule) -> Denoise:
        """The denoiser of B pictures, led."""


class ClassifierGuide:
    """Leads each picture to the class that its settings name, at `classifier_scale`."""

    def __init__(self, classifier: Classifier):
        self.classifier, self.schedule = classifier, make_schedule(classifier.config.schedule)

    def check(self, picture: Settings) -> None:
        """Raise ValueError for a picture of no class that is known."""
        self.classifier.config.row(picture.classifier_class or picture.prompt)

    def around(self, denoise: Denoise, pictures: Sequence[Settings], schedule: Schedule) -> Denoise:
        """By the gradient of log p(y | z_t, t) with respect to z_t, see `by_gradient`."""
        config = self.classifier.config
        with torch.inference_mode(False):  # what autograd keeps may not be made in inference mode
            rows = torch.tensor([config.row(picture.classifier_class or picture.prompt) for picture in pictures])

        def score(z_t: Tensor, t: float) -> Tensor:
            logits = classify(self.classifier, self.schedule, *translated(z_t, t, schedule, self.schedule))
            return logits.log_softmax(1).gather(1, rows.to(logits.device)[:, None])[:, 0]  # [B]

        led = by_gradient(denoise, score, pictures[0].classifier_scale, schedule)
        return lambda z_t, t: (led if schedule(t)[0] > 0 else denoise)(z_t, t)  # noise alone is of no class


class ClipGuide:
    """Leads each picture to its prompt by the cosine of their embeddings, at `clip_scale`.

    It rates the decoded estimate of the clean picture: any CLIP will do, none has to know noise (Bansal et al. 2023).

    Args:
        see: pictures [B, 3, H, W] in [-1, 1] -> [B, d], differentiable.
        read: texts -> [B, d].
        decode: latents [B, c, h, w] -> pictures.
    """

    def __init__(
        self,
        see: Callable[[Tensor], Tensor],
        read: Callable[[Sequence[str]], Tensor],
        decode: Callable[[Tensor], Tensor],
    ):
        self.see, self.read, self.decode = see, read, decode

    def check(self, picture: Settings) -> None:
        """Raise ValueError for a picture without a prompt."""
        if not (picture.clip_prompt or picture.prompt).strip():
            raise ValueError("clip guidance leads to a text, and the prompt is empty; give a prompt or a clip prompt")

    def around(self, denoise: Denoise, pictures: Sequence[Settings], schedule: Schedule) -> Denoise:
        """By the gradient of the cosine with respect to the estimate of z_0, see `by_estimate`."""
        with torch.inference_mode(False), torch.no_grad():
            texts = self.read([picture.clip_prompt or picture.prompt for picture in pictures])

        def score(z_0: Tensor, t: float) -> Tensor:
            seen = self.see(self.decode(z_0))
            return SHARPNESS * torch.cosine_similarity(seen, texts.to(seen))  # [B]

        return by_estimate(denoise, score, pictures[0].clip_scale, schedule, through=False)
