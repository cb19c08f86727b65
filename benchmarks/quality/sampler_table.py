"""Samplers on a trained model: the distance of their latents from those of 1,000 steps, for few network calls.

python -m benchmarks.quality.sampler_table --model checkpoints/emoji --calls 4 8 16 32 64

The table lists the deterministic samplers with several spacings. The distance is the root mean square per latent value,
in unit scale, from the end of the same probability flow, computed by `dpmpp_2m` in 1,000 steps from the same noise. It
prints two Markdown tables, without guidance and with the model's own. A call is one of the denoiser; with guidance the
network computes two images in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from benchmarks.shared.contest import note
from ldm import TextToImage
from ldm.samplers.registry import SAMPLERS

PROMPTS = ("a red heart", "a yellow smiling face", "a house with a garden", "a brown dog")
REFERENCE = dict(sampler="dpmpp_2m", spacing="trailing", steps=1000)
SPACINGS = ("trailing", "log_snr", "karras", "ays")
CALLS = {"S": lambda steps: steps, "S + 1": lambda steps: steps + 1, "2 S - 1": lambda steps: 2 * steps - 1}
UNFIT = ("ode",)  # chooses its own steps


def end(model: TextToImage, prompts: Sequence[str], guidance_scale: float, **how: object) -> Tensor:
    """Sample latents [B, c, h, w] of the prompts in one batch."""
    pictures = model.plan(prompts, guidance_scale=guidance_scale, **how)
    (batch,) = model.batches(pictures, len(prompts))
    *_, last = model.sample(batch)
    return last.z


def steps_for(name: str, calls: int) -> int:
    """Return the largest number of steps whose network calls are within the budget."""
    return next(steps for steps in range(calls, 0, -1) if CALLS[SAMPLERS[name].calls](steps) <= calls)


def table(model: TextToImage, prompts: Sequence[str], guidance_scale: float, budgets: Sequence[int]) -> str:
    """Return a Markdown table with a row per sampler and spacing, sorted by the error at the middle budget."""
    reference = end(model, prompts, guidance_scale, **REFERENCE)
    rows = {}
    for name, sampler in SAMPLERS.items():
        for spacing in SPACINGS if not sampler.draws and name not in UNFIT else ():
            note(f"{guidance_scale:g}: {name}, {spacing}")
            ends = (
                end(model, prompts, guidance_scale, sampler=name, spacing=spacing, steps=steps_for(name, calls))
                for calls in budgets
            )
            rows[name, spacing] = [(z - reference).square().mean().sqrt().item() for z in ends]
    best = [min(row[column] for row in rows.values()) for column in range(len(budgets))]
    lines = [
        f"| sampler | spacing | {' | '.join(f'{calls} calls' for calls in budgets)} |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for (name, spacing), row in sorted(rows.items(), key=lambda item: item[1][len(budgets) // 2]):
        cells = [
            f"**{error:.3f}**" if error == least else f"{error:.3f}" for error, least in zip(row, best, strict=True)
        ]
        lines.append(f"| {name} | {spacing} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/emoji")
    parser.add_argument("--calls", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--guidance-scales", type=float, nargs="+", help="default: 1, and the model's own")
    options = parser.parse_args(argv)
    model = TextToImage.load(options.model)
    for guidance_scale in options.guidance_scales or (1.0, model.defaults.guidance_scale):
        found = table(model, options.prompts, guidance_scale, options.calls)
        print(f"\nGuidance scale {guidance_scale:g}\n\n{found}", flush=True)


if __name__ == "__main__":
    main()
