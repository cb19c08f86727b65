"""The likelihood of latents under a model: terms of the bound, rate and distortion, and the ODE's likelihood.

python -m benchmarks.quality.likelihood --model checkpoints/emoji --cache cache/emoji

The images are those of a latent cache that `stipple cache` wrote. Each is evaluated with its caption and without. The
command prints a table, writes all numbers to docs/likelihood.json, and draws docs/likelihood.png from them. --redraw
only draws.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from autoencoder import Posterior
from benchmarks.shared.contest import note
from conditioning import Context
from ldm import TextToImage
from ldm.guidance.classifier_free import Denoise, classifier_free
from ldm.likelihood.flow_likelihood import ode_bits
from ldm.likelihood.variational_bound import VARIANCES, Bound, rate_distortion, variational_bound
from ldm.samplers.spacing import times
from ldm.samplers.steps import noise_like
from stipple_core.latent_cache.reader import CachedBatch, CachedLatents, cached_collate
from stipple_core.randomness import generator

CONDITIONS = {"the caption": 1.0, "nothing": 0.0}  # condition of the denoiser -> guidance scale
COLORS = dict(zip(CONDITIONS, ("#1f69b4", "#d95f0e"), strict=True))
LOG_2 = math.log(2)


def choose(cache: CachedLatents, count: int, seed: int) -> CachedBatch:
    """Choose `count` random images of a latent cache."""
    order = torch.randperm(len(cache), generator=generator(seed, "pictures"))
    return cached_collate([cache[0, index] for index in order[:count].tolist()])


def generators(options: argparse.Namespace, purpose: str) -> list[torch.Generator]:
    """Return one random generator per image."""
    return [generator(options.seed, purpose, index) for index in range(options.images)]


def denoisers(model: TextToImage, batch: CachedBatch, cache: CachedLatents) -> dict[str, Denoise]:
    """Return a denoiser for each of CONDITIONS."""
    context = Context(tokens=batch.tokens, mask=batch.mask)
    null = Context(tokens=cache.null_tokens[None], mask=cache.null_mask[None])
    return {condition: classifier_free(model.denoiser, context, null, scale) for condition, scale in CONDITIONS.items()}


def every_low_level(visited: Tensor, levels: int) -> Tensor:
    """Replace the last interval of the times by all noise levels in it, because most bits are spent there."""
    lowest = round(visited[-2].item() * levels)
    below = torch.arange(lowest - 1, -1, -1, dtype=torch.float64) / levels
    return torch.cat([visited[:-1], below])


def counted(denoise: Denoise, what: str) -> Denoise:
    """Wrap a denoiser so that it reports the number of its calls after every 50 calls."""
    calls = 0

    def counting(z_t: Tensor, t: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 50 == 0:
            note(f"{what}: {calls} calls")
        return denoise(z_t, t)

    return counting


def remembered(denoise: Denoise) -> Denoise:
    """Wrap a denoiser so that it caches its result per time: bounds of equal noise call it with the same z_t."""
    estimates: dict[float, Tensor] = {}

    def remembering(z_t: Tensor, t: float) -> Tensor:
        if t not in estimates:
            estimates[t] = denoise(z_t, t)
        return estimates[t]

    return remembering


def of_bound(bound: Bound) -> dict[str, Any]:
    """Return the mean terms of a bound and its rate-distortion curve as Python floats."""
    curve = rate_distortion(bound)

    def plain(values: Tensor) -> list[float]:
        return [float(f"{value:.5g}") for value in values.tolist()]

    return {
        "total": bound.total.mean().item(),
        "prior": bound.prior.mean().item(),
        "decoder": bound.decoder.mean().item(),
        "times": plain(bound.times),
        "terms": plain(bound.terms.mean(1)),
        "rate": plain(curve.rate),
        "distortion": plain(curve.distortion),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compute all results that docs/likelihood.json contains."""
    cache = CachedLatents(options.cache)
    model = TextToImage.load(options.model)
    model.unet.requires_grad_(False)
    batch = choose(cache, options.images, options.seed)
    posterior = Posterior.from_moments(batch.moments)
    z_0 = posterior.sample(noise_like(posterior.mean, generators(options, "posterior")))
    entropy = (math.log(2 * math.pi * math.e) + posterior.logvar).mean().item() / (2 * LOG_2)
    visited = every_low_level(times(model.schedule, options.steps), model.schedule.config.timesteps)
    results = {"images": options.images, "dimensions": z_0[0].numel(), "steps": len(visited) - 1, "entropy": entropy}
    results["mean_square"] = z_0.square().mean().item()
    for condition, denoise in denoisers(model, batch, cache).items():
        with torch.inference_mode():
            once, bounds = remembered(counted(denoise, f"bound, {condition}")), {}
            for variance in VARIANCES:
                noise = generators(options, "noise")
                bounds[variance] = of_bound(variational_bound(once, z_0, visited, model.schedule, noise, variance))
        ode_denoise, probes = counted(denoise, f"ODE, {condition}"), generators(options, "probes")
        bits = ode_bits(ode_denoise, z_0, model.schedule, probes, tolerance=options.tolerance)
        results[condition] = bounds | {"ode": bits.mean().item(), "ode_error": bits.std().item() / len(bits) ** 0.5}
    return results


def table(results: Mapping[str, Any]) -> str:
    """Return a Markdown table of bits per dimension by condition of the denoiser."""
    lines = [
        "| conditioned on | bound, large variance | of it decoder | bound, small variance | ODE |",
        "|---" * 5 + "|",
    ]
    for condition in CONDITIONS:
        of_condition = results[condition]
        large, small = of_condition["large"], of_condition["small"]
        numbers = large["total"], large["decoder"], small["total"], of_condition["ode"]
        lines.append(f"| {' | '.join([condition, *(f'{number:.3f}' for number in numbers)])} |")
    ending = "{images} pictures of {dimensions} dimensions, {steps} steps, entropy of the encoder's noise {entropy:.3f}"
    return "\n".join([*lines, "", ending.format(**results) + " bits per dimension"])


def draw(results: Mapping[str, Any]) -> Figure:
    """Plot the cost of steps over time, the distortion over time, and the distortion over rate."""
    page = Figure(figsize=(12.6, 3.6), layout="constrained")
    cost, known, both = page.subplots(1, 3)
    for condition in CONDITIONS:
        bound, look = results[condition]["large"], {"label": f"conditioned on {condition}", "color": COLORS[condition]}
        lengths = [t - s for t, s in zip(bound["times"][:-1], bound["times"][1:], strict=True)]
        costs = [term / length for term, length in zip(bound["terms"], lengths, strict=True)]
        cost.semilogy(bound["times"][:-1], costs, **look)
        known.plot(bound["times"], bound["distortion"], **look)
        both.plot(bound["rate"], bound["distortion"], **look)
    error = "root mean squared error of the estimate"
    cost.set(
        title="What steps cost", xlabel="time t at which the step begins", ylabel="bits per dimension and unit of t"
    )
    known.set(title="What is known of the latents", xlabel="time t", ylabel=error, ylim=(0, None))
    both.set(title="Rate and distortion", xlabel="bits per dimension sent so far", ylabel=error, ylim=(0, None))
    for axes in (cost, known, both):
        axes.grid(alpha=0.3)
        axes.legend()
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/emoji", help="folder of a model")
    parser.add_argument("--cache", default="cache/emoji", help="folder of cached latents of this model's images")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of the bound, to which all below its lowest are added")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of the ODE's solver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="docs", help="folder of likelihood.json and likelihood.png")
    parser.add_argument("--redraw", action="store_true", help="draw what likelihood.json says, and compute nothing")
    options = parser.parse_args(argv)
    kept = Path(options.output) / "likelihood.json"
    if not options.redraw:
        kept.write_text(json.dumps(measure(options)) + "\n")
    results = json.loads(kept.read_text())
    print(table(results))
    draw(results).savefig(kept.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
