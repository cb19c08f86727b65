"""A training step (forward, backward, AdamW, moving average): Stipple against diffusers, each in new processes.

python -m benchmarks.speed.training_step --cases emoji sd15 --rounds 3 --steps 3

`ours` is the step of train_ldm.py with cached latents and contexts. `diffusers` is its UNet and EMAModel (foreach) in
the same loop, with the same latents and contexts. `diffusers' script` is its documented train_text_to_image.py, which
encodes images and captions at each step. Stable Diffusion's shapes take about 20 GB of memory, one process at a time.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.diffusers_training import their_step
from benchmarks.shared import contest, models
from benchmarks.shared.inputs import normal
from benchmarks.shared.processes import contend
from benchmarks.speed.training_case import CASES, Batch, Case, write_batch

THEIRS, SCRIPT = "diffusers", "diffusers' script"
BYTES = 5 * 4  # per parameter: weight, gradient, two moments, moving average


def our_step(case: Case, batch: Batch) -> Callable[[], Tensor]:
    """Return a function that trains one step as `stipple train` does, on cached latents and contexts.

    The function returns the loss.
    """
    from autoencoder import Posterior
    from conditioning import Context
    from ldm.denoising.denoiser import Denoiser
    from ldm.losses.diffusion_loss import diffusion_loss
    from ldm.networks.unet import UNet
    from ldm.schedules.registry import make_schedule
    from stipple.training.optimization.ema import Ema, EmaConfig
    from stipple.training.optimization.optimizer import Optimizer
    from stipple.training.optimization.update_rules import OptimizerConfig
    from stipple_core.operators.winograd import lay_out

    unet = lay_out(models.randomize(models.empty(UNet, case.unet))).train()
    schedule = make_schedule(case.schedule)
    denoiser = Denoiser(unet, schedule, "noise")
    optimizer, ema = Optimizer([unet], OptimizerConfig(warmup_steps=0)), Ema(unet, EmaConfig())
    t = (batch.timesteps + 1) / schedule.config.timesteps
    context = Context(tokens=batch.tokens, mask=batch.mask)

    def step() -> Tensor:
        z_0 = Posterior.from_moments(batch.moments).sample(batch.posterior_noise)
        z_0 = z_0.to(memory_format=torch.channels_last)
        loss = diffusion_loss(denoiser, z_0, context, t, batch.noise).mean()
        optimizer.backward(loss)
        optimizer.step(0, 1, optimizer.gradient_norm())
        ema.update()
        return loss.detach()

    return step


def child(options: argparse.Namespace) -> dict[str, object]:
    """Run one contender in this process; returns the loss of the first step and the seconds of the others."""
    torch.set_num_threads(options.threads)
    case, batch = CASES[options.cases[0]], Batch.read(options.batch)
    if options.contender == contest.OURS:
        step = our_step(case, batch)
    else:
        step = their_step(case, batch, Path(options.model), script=options.contender == SCRIPT)
    first, losses = step().item(), []
    times = [contest.measure(lambda: losses.append(step())) for _ in range(options.steps)]
    wall, cpu = (statistics.median(part) for part in zip(*times, strict=True))
    return {"loss": first, "last_loss": losses[-1].item(), "wall": wall, "cpu": cpu}


def race(name: str, options: argparse.Namespace) -> dict[str, contest.Times]:
    """Run the processes of the contenders in turn. Raises RuntimeError if their first losses differ."""
    model, folder = CASES[name].folder(options.workdir).resolve(), Path(options.workdir).resolve() / "batches" / name
    write_batch(CASES[name], model, folder)
    times = {contender: contest.Times() for contender in (contest.OURS, THEIRS, SCRIPT)}
    flags = ["--cases", name, "--batch", folder, "--model", model]
    flags += ["--threads", options.threads, "--steps", options.steps]
    for number in range(options.rounds):
        losses = {}
        for contender in list(times)[:: -1 if number % 2 else 1]:
            found = contend("speed.training_step", "--contender", contender, *flags)
            times[contender].add(found["wall"], found["cpu"])
            losses[contender] = found["loss"]
            contest.note(f"{name}, {contender}: {found}")
        for loss in losses.values():
            if not abs(loss / losses[contest.OURS] - 1) < 1e-4:
                raise RuntimeError(f"{name}: first losses {losses} differ; there is nothing to compare")
    return times


def flops(case: Case) -> int:
    """Count the operations of the forward and backward pass of the UNet by the definition of its layers."""
    unet, meta = models.their_unet(case.unet), functools.partial(normal, device="meta")
    z_t = meta(case.batch_size, case.unet.in_channels, case.size, case.size)
    tokens = meta(case.batch_size, 77, case.unet.cross_attention_dim)
    return models.count_flops(lambda: unet(z_t, 1, tokens, return_dict=False)[0].sum().backward())


def missing_memory(case: Case) -> str:
    """Return why a case can't run on this machine, or an empty string. Requires Linux."""
    needed = sum(p.numel() for p in models.their_unet(case.unet).parameters()) * BYTES * 1.15
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return "" if free > needed else f"it needs {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"


def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=3)
    parser.add_argument("--workdir", default=contest.WORKDIR, help="where models and batches are written to")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["emoji", "sd15"])
    parser.add_argument("--steps", type=int, default=3, help="per process, after the first; their median counts")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # the contender that this process runs
    parser.add_argument("--batch", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.contender is not None:
        print(json.dumps(child(options)))
        return
    torch.set_num_threads(options.threads)
    peak = contest.gemm_peak(options.tiny)
    for name in ["tiny"] if options.tiny else options.cases:
        if reason := missing_memory(CASES[name]):
            print(f"\n{name}: skipped, {reason}")
            continue
        work = contest.Work(flops(CASES[name]), peak)
        title = f"Training step, {name}, batch {CASES[name].batch_size}, {work.flops / 1e9:.3g} GFLOP in the UNet"
        print(f"\n{title}\n\n{contest.table(race(name, options), work)}", flush=True)
    print(f"\n{contest.machine(options.threads, peak)}; {options.rounds} rounds of {options.steps} steps")


if __name__ == "__main__":
    main()
