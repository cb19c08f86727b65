"""The codebook of a VQ autoencoder, its use, and the restart of unused entries (van den Oord et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2**24  # distances computed at a time to find nearest codes, 64 MB


@dataclass(frozen=True)
class Quantized:
    """Latents replaced by their nearest codes."""

    latents: Tensor  # [B, d, h, w] codes, with straight-through gradients to the input
    indices: Tensor  # [B, h, w], numbers of the codes
    loss: Tensor  # [] codebook loss + beta * commitment loss


class VectorQuantizer(nn.Module):
    """A codebook, which replaces latents by their nearest codes (van den Oord et al. 2017, eqs. 1-3).

    The commitment weight multiplies |z_e - sg(z_q)|^2, as in the paper. By default, CompVis multiplies the other term.
    """

    def __init__(self, size: int, channels: int, commitment: float):
        super().__init__()
        self.commitment = commitment
        self.embedding = nn.Embedding(size, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents [B, d, h, w] with straight-through gradients, and compute the losses, in float32."""
        z_e = latents.float()
        indices = self.nearest(z_e)
        z_q = self.lookup(indices).float()  # [B, h, w] -> [B, d, h, w]
        codebook_loss = F.mse_loss(z_q, z_e.detach())
        commitment_loss = F.mse_loss(z_e, z_q.detach())
        straight = z_e + (z_q - z_e).detach()
        return Quantized(straight.to(latents.dtype), indices, codebook_loss + self.commitment * commitment_loss)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Return the indices [B, h, w] of the codes nearest to latents [B, d, h, w] in Euclidean distance."""
        codes = self.embedding.weight.float()
        vectors = flatten(latents).float()
        offset = 0.5 * codes.square().sum(dim=1)  # argmin |z - e|^2 = argmin |e|^2 / 2 - z.e
        with torch.autocast(latents.device.type, enabled=False):
            parts = vectors.split(max(1, CHUNK // codes.shape[0]))
            indices = torch.cat([torch.addmm(offset, part, codes.T, alpha=-1.0).argmin(dim=1) for part in parts])
        b, _, height, width = latents.shape
        return indices.reshape(b, height, width)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [B, d, h, w] of indices [B, h, w]."""
        return self.embedding(indices).permute(0, 3, 1, 2)  # [B, h, w, d] -> [B, d, h, w]

    def counts(self, indices: Tensor) -> Tensor:
        """Count how often each code occurs in indices of any shape: [codebook size], int64."""
        return torch.bincount(indices.flatten(), minlength=self.embedding.num_embeddings)


def flatten(latents: Tensor) -> Tensor:
    """Latents [B, d, h, w] as vectors [B * h * w, d]."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


@torch.no_grad()
def revive(codebook: Tensor, counts: Tensor, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Replace codes that were never used by candidates, in place; return the indices of the replaced codes.

    The result depends only on the arguments: processes that pass the same counts, candidates and generator keep equal
    codebooks. Candidates are drawn without replacement. If there are fewer candidates than unused codes, the first
    unused codes are replaced.

    Args:
        codebook: [K, d], such as `quantize.embedding.weight`.
        counts: [K], uses since the last revival, summed over processes.
        candidates: [N, d], recent encoder outputs (`flatten(posterior.mean)`), the same on every process.
        generator: a CPU generator that draws candidates.

    Source: Dhariwal et al. 2020 (Jukebox), section 3.1, "random restart".
    """
    dead = (counts == 0).nonzero().flatten()[: candidates.shape[0]].to(codebook.device)
    chosen = torch.randperm(candidates.shape[0], generator=generator)[: dead.numel()]
    codebook[dead] = candidates[chosen.to(candidates.device)].to(codebook)
    return dead


def usage(counts: Tensor) -> float:
    """The fraction of codes that are used, from counts [K]."""
    return (counts > 0).float().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of code frequencies, from counts [K]: K if all are used equally, 1 for a single code, 0 for none."""
    total = counts.sum()
    if total == 0:
        return 0.0
    frequencies = counts.double() / total
    return torch.special.entr(frequencies).sum().exp().item()
