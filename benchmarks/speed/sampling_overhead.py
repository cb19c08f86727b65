"""The cost of sampling besides the network: samplers, guidance, and the denoiser's arithmetic.

python -m benchmarks.speed.sampling_overhead --config configs/ldm/tiny.yaml --steps 20

It samples one image with guidance and a random UNet of the config's shapes. All steps are timed, and the network within
them. The overhead is the difference divided by the network's time; the result is the median of the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.shared import contest, models
from conditioning import Context
from ldm.denoising.denoiser import Denoiser
from ldm.guidance.registry import GuidanceConfig, Ingredients, guided
from ldm.networks.cached_unet import CachedUNet
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from ldm.samplers.steps import initial_noise
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule
from stipple_core.config import read_yaml
from stipple_core.operators.winograd import lay_out

TOKENS = 20


class Timed:
    """Adds up the seconds of all calls of a module."""

    def __init__(self, module: nn.Module):
        self.seconds = 0.0
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.started


def walk(unet: UNet, timed: Timed, sampler: str, steps: int, method: str) -> float:
    """Return the time that sampling takes besides the network, relative to the time of the network."""
    schedule = make_schedule(ScheduleConfig())
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    context, null = (Context(tokens=torch.randn(1, TOKENS, width)) for _ in range(2))
    generators = [torch.Generator().manual_seed(0)]
    visited = times(schedule, steps, "trailing", SAMPLERS[sampler].time_defaults)
    z = initial_noise((1, unet.config.in_channels, side, side), generators, schedule)
    denoiser = Denoiser(CachedUNet(unet), schedule, "noise").prepared(visited)
    values = Ingredients(denoiser=denoiser, context=context, null=null, times=visited)
    denoise = guided(GuidanceConfig(method=method, scale=0.6 if method == "cfg_plus_plus" else 4.0), values)
    start, timed.seconds = time.perf_counter(), 0.0
    for _ in SAMPLERS[sampler].run(denoise, z, visited, schedule, generators):
        pass
    return (time.perf_counter() - start) / timed.seconds - 1


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=7)
    parser.add_argument("--config", default=str(contest.ROOT / "configs/ldm/tiny.yaml"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    unet = lay_out(models.randomize(models.empty(UNet, UNetConfig(**read_yaml(options.config)["unet"])))).eval()
    timed = Timed(unet)
    ways = [(name, "classifier_free") for name in SAMPLERS]
    ways += [("dpmpp_2m", method) for method in ("apg", "cfg_plus_plus", "cfg_zero_star", "perturbed_attention")]
    shares: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for index in range(-1, options.rounds):
        for way in ways:
            share = walk(unet, timed, way[0], options.steps, way[1])
            if index >= 0:
                shares[way].append(share)
    print("\n| sampler | guidance | added to the network's time: median (least - most) |\n|---|---|---|")
    for (sampler, method), found in shares.items():
        print(f"| {sampler} | {method} | {statistics.median(found):.1%} ({min(found):.1%} - {max(found):.1%}) |")
    print(f"\n{contest.machine(options.threads)}; {options.rounds} rounds")


if __name__ == "__main__":
    main()
