"""A UNet's forward pass: Stipple against diffusers at its documented settings, on the same weights, in one process.

python -m benchmarks.speed.unet_forward --sizes 32 64 --rounds 5

Stable Diffusion 1.5's shapes in float32, called as classifier-free guidance does: z_t twice, with two contexts. Stipple
computes keys and values of the contexts once before, as its pipeline does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers import diffusers_calls
from benchmarks.shared import contest, models
from benchmarks.shared.inputs import Pair
from conditioning import Context
from ldm.networks.cached_unet import CachedUNet


def our_call(unet: nn.Module, pair: Pair) -> Callable[[], Tensor]:
    """Return a forward pass of Stipple as in sampling: repeated keys, values and latents are computed once."""
    cached, context = CachedUNet(unet), Context(tokens=pair.tokens)
    timestep = torch.full((len(pair.z_t),), float(pair.timestep))
    return lambda: cached(pair.z_t, timestep, context)


def networks(tiny: bool, compiled: bool = False) -> dict[str, nn.Module]:
    """Return all contenders with equal weights, which share memory except for convolutions."""
    config = models.shapes(tiny).unet
    weights = dict(models.randomize(models.their_unet(config)).state_dict())

    def other(channels_last: bool) -> nn.Module:
        return models.sharing(models.their_unet(config), weights, channels_last)

    found = {
        contest.OURS: models.our_unet(config, weights),
        "diffusers": other(False),
        "diffusers, channels_last": other(True),
    }
    if compiled:
        freezing = {"max_autotune": True, "freezing": True}
        found["diffusers, compiled max-autotune"] = torch.compile(other(True), mode="max-autotune")
        found["diffusers, compiled and frozen"] = torch.compile(other(True), options=freezing)
    return found


def race(networks: dict[str, nn.Module], size: int, width: int, rounds: int) -> dict[str, contest.Times]:
    """Check that all outputs equal Stipple's, then time all contenders."""
    pair = Pair.draw(size, width)
    calls = {
        n: (our_call if n == contest.OURS else diffusers_calls.unet_call)(unet, pair) for n, unet in networks.items()
    }
    output = calls[contest.OURS]()
    for name, call in calls.items():
        if name != contest.OURS:
            contest.require_equal(output, call(), f"{size} x {size}, {name}")
    return contest.alternate(calls, rounds, warm_up=False)  # the check was the warm-up


def flops(size: int, tiny: bool) -> int:
    """Count the operations of a forward pass by the definition of its layers."""
    config = models.shapes(tiny).unet
    pair = Pair.draw(size, config.cross_attention_dim, device="meta")
    return models.count_flops(diffusers_calls.unet_call(models.their_unet(config), pair))


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="sides of the latents")
    parser.add_argument("--compile", action="store_true", help="diffusers by torch.compile too, which takes minutes")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    peak = contest.gemm_peak(options.tiny)
    contenders = networks(options.tiny, options.compile)
    for size in options.sizes:
        times = race(contenders, size, models.shapes(options.tiny).unet.cross_attention_dim, options.rounds)
        work = contest.Work(flops(size, options.tiny), peak)
        title = f"UNet forward, 2 x {size} x {size} latents, {work.flops / 1e9:.3g} GFLOP"
        print(f"\n{title}\n\n{contest.table(times, work)}", flush=True)
    print(f"\n{contest.machine(options.threads, peak)}; {options.rounds} rounds")


if __name__ == "__main__":
    main()
