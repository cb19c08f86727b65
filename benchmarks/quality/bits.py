"""Bits per dimension of held-out images under models of pixels: the bound, the ODE's, and rate against distortion.

python -m benchmarks.quality.bits --folder PICTURES runs/ddpm-small/model
python -m benchmarks.quality.bits --folder PICTURES early=MODEL later=MODEL --output docs/tasks/pixels

The images are those that a run on the same folder holds out. The bound uses all noise levels, estimates clipped to
[-1, 1], and the discretized decoder (Ho et al. 2020, section 3.3). The ODE's likelihood is that of Song et al. 2021,
unclipped, with the same decoder. With --output, numbers are written to OUTPUT.json and the figure to OUTPUT.png;
--redraw only draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.shared.contest import note
from ldm import TextToImage
from ldm.guidance.classifier_free import Denoise, classifier_free
from ldm.guidance.thresholding import thresholded
from ldm.likelihood.flow_likelihood import ode_bound
from ldm.likelihood.variational_bound import EIGHT_BIT_UNIT, Bound, RateDistortion, rate_distortion, variational_bound
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.sources.scan import scan
from stipple_core.randomness import generator

VARIANCE = "large"  # variance of the bound; "small" gives more bits (docs/likelihood.md)
TOGETHER = 8  # batch size


def held_out(folder: str, size: int, share: float, count: int) -> Tensor:
    """Load 8-bit images [B, 3, H, W] in [-1, 1] that a run on this folder holds out for validation."""
    config = DataConfig(folder=folder, image_size=size, validation=share)
    records = scan(config, captioned=False).validation
    pictures = (ImageDataset(records, config, 0).picture(index) for index in range(len(records)))
    return torch.stack([picture for _, picture in zip(range(count), pictures, strict=False) if picture is not None])


def denoiser(model: TextToImage, batch: int) -> Denoise:
    """Return an unconditional denoiser of pixels. Raises ValueError if the model has an autoencoder."""
    if model.autoencoder.downsampling != 1:
        raise ValueError("bits of pictures are those of models of pixels: train one with autoencoder=pixels")
    null = model.conditioner.null(batch) if model.is_conditional else None
    return classifier_free(model.denoiser, null, None, 1.0)


def batches(images: Tensor, seed: int, purpose: str) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
    """Yield batches of images, with one generator per image that depends on the index of the image."""
    for first in range(0, len(images), TOGETHER):
        part = images[first : first + TOGETHER]
        yield part, [generator(seed, purpose, first + place) for place in range(len(part))]


def bound(model: TextToImage, images: Tensor, steps: int, seed: int) -> Bound:
    """Compute the variational bound with `steps` evenly spaced noise levels."""
    times, parts = torch.linspace(1, 0, steps + 1, dtype=torch.float64), []
    times = torch.cat([model.schedule.nearest(times[:-1]), times[-1:]])
    for part, draws in batches(images, seed, "noise"):
        with torch.inference_mode():
            denoise = thresholded(denoiser(model, len(part)), 1.0)  # as in the paper's chain: pixels are in [-1, 1]
            parts.append(variational_bound(denoise, part, times, model.schedule, draws, VARIANCE, "discretized"))
        note(f"bound of {len(part)} pictures: {parts[-1].total.mean():.3f}")
    return Bound(
        times=parts[0].times,
        prior=torch.cat([part.prior for part in parts]),
        terms=torch.cat([part.terms for part in parts], 1),
        decoder=torch.cat([part.decoder for part in parts]),
        errors=torch.cat([part.errors for part in parts], 1),
    )


def flow(model: TextToImage, images: Tensor, tolerance: float, seed: int) -> Tensor:
    """Compute bits per dimension [B] with the probability flow ODE and the decoder of the variational bound."""
    model.unet.requires_grad_(False)
    found = []
    for part, draws in batches(images, seed, "ode"):
        found.append(ode_bound(denoiser(model, len(part)), part, model.schedule, draws, tolerance=tolerance))
        note(f"ODE of {len(part)} pictures: {found[-1].mean():.3f}")
    return torch.cat(found)


def measure(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compute all results of one model: the numbers of the table and the curves of the figure."""
    model = TextToImage.load(path)
    images = held_out(options.folder, model.unet.config.sample_size, options.held_out, options.images)
    found = bound(model, images, options.steps, options.seed)
    curve: RateDistortion = rate_distortion(found, EIGHT_BIT_UNIT)
    spread = found.total.std() / len(images) ** 0.5
    result = {"images": len(images), "bound": found.total.mean().item(), "bound_error": spread.item()}
    result |= {"rate": (found.total - found.decoder).mean().item(), "decoder": found.decoder.mean().item()}
    result |= {"distortion": curve.distortion[-1].item(), "prior": found.prior.mean().item()}
    result["curve"] = {name: _plain(getattr(curve, name)) for name in ("times", "rate", "distortion")}
    if options.tolerance:
        bits = flow(model, images, options.tolerance, options.seed)
        result |= {"ode": bits.mean().item(), "ode_error": (bits.std() / len(images) ** 0.5).item()}
        result["above_ode"] = (found.total > bits).float().mean().item()
    return result


def _plain(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values[:: max(1, len(values) // 200)].tolist()]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of bits per dimension by model."""
    lines = ["| model | bound | of it rate | of it decoder | distortion of 255 | ODE |", "|---" * 6 + "|"]
    for name, found in results.items():
        numbers = (f"{found[key]:.3f}" for key in ("bound", "rate", "decoder"))
        flowed = f"{found['ode']:.3f}" if "ode" in found else "-"
        lines.append(f"| {name} | {' | '.join(numbers)} | {found['distortion']:.2f} | {flowed} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot distortion over time, rate over time, and distortion over rate, as in Ho et al. 2020, figure 5."""
    page = Figure(figsize=(12.6, 3.6), layout="constrained")
    known, sent, both = page.subplots(1, 3)
    for name, found in results.items():
        curve, label = found["curve"], {"label": f"{name}: {found['bound']:.2f} bits"}
        backward = [1 - t for t in curve["times"]]
        known.plot(backward, curve["distortion"], **label)
        sent.plot(backward, curve["rate"], **label)
        both.plot(curve["rate"], curve["distortion"], **label)
    error, spent = "distortion: RMSE of 255", "rate: bits per dimension sent"
    known.set(title="What is known", xlabel="reverse time 1 - t", ylabel=error)
    sent.set(title="What was sent", xlabel="reverse time 1 - t", ylabel=spent)
    both.set(title="Rate and distortion", xlabel=spent, ylabel=error)
    for axes in (known, sent, both):
        axes.grid(alpha=0.3)
        axes.set_ylim(0)
    both.legend()
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="[NAME=]MODEL", help="folders of models of pixels")
    parser.add_argument("--folder", help="of pictures, as the models' data.folder")
    parser.add_argument("--held-out", type=float, default=0.02, metavar="SHARE", help="as the models' data.validation")
    parser.add_argument("--images", type=int, default=24, help="at most")
    parser.add_argument("--steps", type=int, default=1000, help="noise levels of the bound")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of the ODE's solver; 0: no ODE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="PATH", help="keep numbers in PATH.json, and draw them to PATH.png")
    parser.add_argument("--redraw", action="store_true", help="draw what PATH.json says, and compute nothing")
    options = parser.parse_args(argv)
    kept = None if options.output is None else Path(f"{options.output}.json")
    results = json.loads(kept.read_text()) if options.redraw else {}
    for model in () if options.redraw else options.models:
        name, _, path = model.rpartition("=")
        results[name or Path(path).parent.name] = measure(path, options)
        if kept is not None:
            kept.write_text(json.dumps(results) + "\n")
    print(table(results))
    if kept is not None:
        draw(results).savefig(kept.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
