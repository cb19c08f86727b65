"""Decoding and encoding with Stable Diffusion's KL autoencoder: Stipple against diffusers, on the same weights.

python -m benchmarks.speed.decode --sizes 512 --batch 1 --rounds 5

diffusers' slicing and tiling trade time for memory. `--savings slicing tiling` also lists them; slicing has no effect
on one image, and tiling none up to the size in the config. See `benchmarks.speed.peak_memory` for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers import diffusers_calls
from benchmarks.shared import contest, models
from benchmarks.shared.inputs import normal

WAYS = ("decode", "encode")


def our_call(autoencoder: nn.Module, way: str, inputs: Tensor) -> Callable[[], Tensor]:
    """Decode unit-scale latents with Stipple, or encode images to the mean of their latents."""
    return lambda: autoencoder.decode(inputs) if way == "decode" else autoencoder.encode(inputs).mode()


def their_call(vae: nn.Module, way: str, inputs: Tensor) -> Callable[[], Tensor]:
    """Decode or encode with diffusers, see `our_call`."""
    return (diffusers_calls.decode_call if way == "decode" else diffusers_calls.encode_call)(vae, inputs)


def networks(tiny: bool, savings: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Return all contenders, with equal weights."""
    config = models.shapes(tiny).vae
    weights = dict(models.randomize(models.their_vae(config)).state_dict())
    found = {contest.OURS: models.our_vae(config, weights)}
    for layout in ("", ", channels_last"):
        for saving in (None, *savings):
            vae = models.sharing(models.their_vae(config), weights, channels_last=bool(layout))
            diffusers_calls.save_memory(saving, vae)
            found[f"diffusers{layout}" + (f", {saving}" if saving else "")] = vae
    return found


def inputs(way: str, size: int, batch: int, tiny: bool, device: str = "cpu") -> Tensor:
    """Return random latents [B, 4, h, w] or images [B, 3, H, W] for images of `size` pixels."""
    side = size // models.shapes(tiny).vae.downsampling
    shape = (batch, 4, side, side) if way == "decode" else (batch, 3, size, size)
    return normal(*shape, device=device)


def race(networks: dict[str, nn.Module], way: str, inputs: Tensor, rounds: int) -> dict[str, contest.Times]:
    """Check that all outputs equal Stipple's (report the error of tiled ones), then time all contenders."""
    calls = {
        name: (our_call if name == contest.OURS else their_call)(net, way, inputs) for name, net in networks.items()
    }
    output = calls[contest.OURS]()
    for name, call in calls.items():
        if name != contest.OURS:
            limit = float("inf") if "tiling" in name else 1e-4
            contest.require_equal(output, call(), f"{way} {tuple(inputs.shape)}, {name}", limit)
    return contest.alternate(calls, rounds, warm_up=False)  # the check was the warm-up


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="sides of the pictures in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures together")
    parser.add_argument("--savings", nargs="+", choices=diffusers_calls.SAVINGS[:2], default=[], help="of diffusers'")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    peak = contest.gemm_peak(options.tiny)
    contenders = networks(options.tiny, options.savings)
    meta = models.their_vae(models.shapes(options.tiny).vae)
    for size in options.sizes:
        for way in WAYS:
            times = race(contenders, way, inputs(way, size, options.batch, options.tiny), options.rounds)
            counted = inputs(way, size, options.batch, options.tiny, "meta")
            work = contest.Work(models.count_flops(their_call(meta, way, counted)), peak)
            title = f"{way} {options.batch} x {size} x {size} pixels, {work.flops / 1e9:.3g} GFLOP"
            print(f"\n{title}\n\n{contest.table(times, work)}", flush=True)
    print(f"\n{contest.machine(options.threads, peak)}; {options.rounds} rounds")


if __name__ == "__main__":
    main()
