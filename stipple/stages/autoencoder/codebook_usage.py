"""The usage of a VQ codebook while it is trained, and the revival of unused codes."""

from __future__ import annotations

import torch
from torch import Tensor

from autoencoder import Autoencoder
from autoencoder.networks.vector_quantizer import flatten, perplexity, revive, usage
from stipple.training.optimization.ema import Ema
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.trainer import Trainer
from stipple_core.randomness import generator


class Codebook:
    """Counts how often each code was used since the last revival, over all processes."""

    def __init__(self, autoencoder: Autoencoder, trainer: Trainer):
        self.quantizer, self.trainer = autoencoder.quantize, trainer
        self.counts = torch.zeros(autoencoder.config.codebook_size, dtype=torch.int64, device=trainer.device)
        self.step_counts = torch.zeros_like(self.counts)  # of this process, in the current optimizer step
        self.candidates: Tensor | None = None

    def add(self, indices: Tensor, latents: Tensor) -> None:
        """Count the codes of a micro-batch; the first one of a step provides the candidates of a revival."""
        self.step_counts += self.quantizer.counts(indices)
        if self.trainer.micro == 0:
            self.candidates = flatten(latents.detach())
        if self.trainer.last_micro:
            if not self.trainer.step_skipped:
                self.counts += self.trainer.sum(self.step_counts)
            self.step_counts.zero_()

    def due(self, every: int) -> bool:
        """Whether a revival is due, one each `every` steps (0: never); skipped steps have none.

        Unlike `Trainer.due`, it is not due at the last step, after which revived codes could not be trained.
        """
        trainer = self.trainer
        return trainer.last_micro and not trainer.step_skipped and every > 0 and (trainer.step + 1) % every == 0

    def revive(self, seed: int, average: Ema, optimizer: Optimizer) -> dict[str, float]:
        """Move unused codes, also in the average, to encoder outputs; returns usage and perplexity since then."""
        candidates = self.trainer.from_main(self.candidates.contiguous())
        measured = {"codebook_usage": usage(self.counts), "codebook_perplexity": perplexity(self.counts)}
        codes = self.quantizer.embedding.weight
        moved = revive(codes.data, self.counts, candidates, generator(seed, "revive", self.trainer.step))
        average.averages["quantize.embedding.weight"][moved] = codes.data[moved].float()
        optimizer.forget(codes, moved)
        measured["codes_revived"] = float(len(moved))
        self.counts.zero_()
        return measured

    def state_dict(self) -> dict:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.counts.copy_(state["counts"])
