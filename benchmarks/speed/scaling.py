"""The requirements of a run on many GPUs, computed from configs: operations, communication, memory and storage.

python -m benchmarks.speed.scaling --images 400e6 --gpus 1 8 64 256

Parameters and operations are counted on the meta device. Writing and reading a checkpoint, hashing and mapping are
measured on 1 GB. All other numbers are the assumptions in `Assumed`, each of which is an option.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from benchmarks.shared import contest, models
from ldm.networks.unet import UNet
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.config import load_config
from stipple_core.files.checkpoint_folder import write_folder
from stipple_core.files.manifest import problem
from stipple_core.files.training_state import load_state, save_state

CONFIGS = ("txt2img-mini", "txt2img-small", "text2img-256", "txt2img-1p4b")
STATE_BYTES = 4 * 4  # per parameter: weight, two moments, moving average, each float32


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """The assumptions, which are neither counted nor measured."""

    images: float = 400e6  # captioned pictures, each of one caption
    picture_bytes: float = 50e3  # bytes of an image file of about 400 pixels
    per_shard: float = 10_000  # images per tar shard
    tokens: float = 25  # of a caption, on average, where masked ones are not kept; without a mask: max_length
    sustained: float = 250e12  # operations per second and GPU: a quarter of an H100's dense bfloat16 peak of 989e12
    inside: float = 300e9  # bytes per second and GPU that an all-reduce reaches inside a machine of 8
    between: float = 40e9  # the same where machines of 8 are joined by 400 Gbit/s per GPU
    writer: float = 250e6  # bytes per second that one process copies to the CPU, hashes and writes durably
    disk: float = 4e9  # bytes per second that the run folder's disk takes from all of them


@dataclass(frozen=True)
class Job:
    """The requirements of training with one config."""

    name: str
    parameters: int  # of the UNet
    flops: int  # of a training step per image: forward, and backward at twice that
    moments: int  # numbers per picture in the latent cache
    width: int  # of a context


def count(name: str) -> Job:
    """Count the parameters and operations of a config on the meta device."""
    values = [f"data.folder={tempfile.gettempdir()}", "autoencoder=none"]
    config = load_config(LdmRunConfig, str(contest.ROOT / f"configs/ldm/{name}.yaml"), values)
    unet, size = models.empty(UNet, config.unet), config.unet.sample_size
    z_t = torch.empty(1, config.unet.in_channels, size, size, device="meta")
    tokens = torch.empty(1, 77, config.unet.cross_attention_dim, device="meta")
    peer = models.their_unet(config.unet)  # whose convolutions the counter knows
    forward = models.count_flops(lambda: peer(z_t, torch.zeros(1, device="meta"), tokens))
    parameters = sum(p.numel() for p in unet.parameters())
    numbers = 2 * config.unet.in_channels * size * size
    return Job(name, parameters, 3 * forward, numbers, config.unet.cross_attention_dim)


def step_table(jobs: Sequence[Job], assumed: Assumed) -> str:
    """Return a table of the seconds of a ring all-reduce of float32 gradients, and of the batch that takes as long."""
    lines = ["| config | UNet | TFLOP per image | moved per GPU and step | inside a machine | between machines |"]
    lines += ["|---|---|---|---|---|---|"]
    for job in jobs:
        moved = 2 * 4 * job.parameters  # reduce-scatter, all-gather; (n - 1) / n of it on n GPUs
        cells = []
        for speed in (assumed.inside, assumed.between):
            images = moved / speed * assumed.sustained / job.flops
            cells.append(f"{moved / speed * 1000:.0f} ms, {images:.0f} images")
        sizes = f"{job.parameters / 1e6:,.1f} M | {job.flops / 1e12:.2f} | {moved / 1e9:.1f} GB"
        lines.append(f"| {job.name} | {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def disk_table(jobs: Sequence[Job], gpus: Sequence[int], assumed: Assumed) -> str:
    """Return a table of bytes of latents, contexts and checkpoints, and of days of computation per epoch."""
    lines = [
        "| config | moments, fp16 | contexts, fp16 | state | written by one | by 8 (FSDP) | days per epoch on GPUs |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for job in jobs:
        moments = assumed.images * job.moments * 2
        contexts = assumed.images * assumed.tokens * job.width * 2
        state = STATE_BYTES * job.parameters
        days = [assumed.images * job.flops / assumed.sustained / world / 86400 for world in gpus]
        epochs = ", ".join(f"{each:.3g} ({world})" for world, each in zip(gpus, days, strict=True))
        cells = f"{moments / 1e12:.1f} TB | {contexts / 1e12:.1f} TB | {state / 1e9:.1f} GB"
        seconds = [f"{state / min(assumed.disk, writers * assumed.writer):.0f} s" for writers in (1, 8)]
        lines.append(f"| {job.name} | {cells} | {' | '.join(seconds)} | {epochs} |")
    return "\n".join(lines)


def measured(gigabytes: float) -> str:
    """Measure the seconds per GB of writing, verifying and loading a checkpoint on this machine."""
    state = {"x": {str(i): torch.randn(int(gigabytes * 1e9 / 64)) for i in range(16)}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-0000001"
        write, _ = contest.measure(lambda: write_folder(path, lambda temporary: save_state(temporary, state)))
        verify, _ = contest.measure(lambda: problem(path))
        load, _ = contest.measure(
            lambda: [each.clone() for each in load_state(path)["x"].values()]
        )  # the file is memory-mapped
    seconds = [f"{name} {value / gigabytes:.1f} s" for name, value in
               (("written, fsynced and hashed", write), ("verified", verify), ("loaded", load))]  # fmt: skip
    return f"Per GB of state on this machine: {', '.join(seconds)}."


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Assumed):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of state written to measure this machine")
    options = parser.parse_args(argv)
    assumed = Assumed(**{field.name: getattr(options, field.name) for field in fields(Assumed)})
    jobs = [count(name) for name in CONFIGS]
    total = assumed.images * assumed.picture_bytes
    print(f"{assumed.images:,.0f} pictures: {assumed.images / assumed.per_shard:,.0f} shards, {total / 1e12:.0f} TB.\n")
    print(f"{step_table(jobs, assumed)}\n\n{disk_table(jobs, options.gpus, assumed)}\n")
    print(measured(options.gigabytes))


if __name__ == "__main__":
    main()
