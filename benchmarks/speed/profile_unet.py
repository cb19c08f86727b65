"""The time of a UNet's forward pass by kind of layer, in Stipple and diffusers, with the share of the GEMM peak.

python -m benchmarks.speed.profile_unet --size 64 --rounds 3

The self time of each operator, as torch.profiler measures it, is assigned to the first of KINDS that called it. It is
the time of the main thread, including its waiting for the others. Operations are those of the layers' definition.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import diffusers_calls
from benchmarks.shared import contest, models
from benchmarks.shared.inputs import Pair
from benchmarks.speed.unet_forward import networks, our_call
from stipple_core.operators.winograd import Convolution, fits, has_fast_layout

WINOGRAD, CONVOLUTION, ATTENTION, LINEAR = "convolution, Winograd", "convolution, others", "attention", "linear layers"
NORMALIZATION, REST = "normalization, activation", "rest"
KINDS = {  # the name of an operator, or of an autograd function of ours
    "_Winograd": WINOGRAD,
    "aten::conv2d": CONVOLUTION,
    "aten::scaled_dot_product_attention": ATTENTION,
    "aten::linear": LINEAR,
    "aten::group_norm": NORMALIZATION,
    "aten::layer_norm": NORMALIZATION,
    "aten::silu": NORMALIZATION,
    "aten::silu_": NORMALIZATION,
    "aten::gelu": NORMALIZATION,
}


def seconds_by_kind(call: Callable[[], Tensor]) -> dict[str, float]:
    """Return the seconds of one call by kind of layer."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    found: Counter[str] = Counter()
    for event in profiler.events():
        found[_kind(event)] += event.self_cpu_time_total / 1e6
    return dict(found)


def _kind(event: Any) -> str:
    """Return the kind of the outermost caller that has a kind."""
    kind = REST
    while event is not None:
        kind = KINDS.get(event.name, kind)
        event = event.cpu_parent
    return kind


def flops_by_kind(network: nn.Module, call: Callable[[], Tensor]) -> dict[str, float]:
    """Count the operations of convolutions and linear layers in one call with hooks."""
    found: Counter[str] = Counter()

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        winograd = isinstance(module, Convolution) and fits(module.weight) and has_fast_layout(module.weight)
        kind = WINOGRAD if winograd else CONVOLUTION if isinstance(module, nn.Conv2d) else LINEAR
        outputs = output.numel() / module.weight.shape[0]  # of one channel
        found[kind] += 2 * outputs * module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    call()
    for hook in hooks:
        hook.remove()
    return dict(found)


def table(seconds: Mapping[str, Mapping[str, float]], flops: Mapping[str, Mapping[str, float]], peak: float) -> str:
    """Return a Markdown table: seconds, share of time, and share of the peak speed by kind and contender."""
    titles = [f"{name}: {what}" for name in seconds for what in ("seconds", "share", "of peak")]
    lines = [f"| layers | {' | '.join(titles)} | ratio: ours / theirs |", "|---" * (len(titles) + 2) + "|"]
    kinds = dict.fromkeys([*KINDS.values(), REST])
    sums = {name: sum(by_kind.values()) for name, by_kind in seconds.items()}
    for kind in kinds:
        cells = [kind]
        for name, by_kind in seconds.items():
            took, work = by_kind.get(kind, 0.0), flops[name].get(kind)
            cells += [f"{took:.3f}", f"{took / sums[name]:.0%}", f"{work / took / peak:.0%}" if work and took else ""]
        first, second = (by_kind.get(kind, 0.0) for by_kind in seconds.values())
        lines.append(f"| {' | '.join(cells)} | {f'{first / second:.2f}' if second else ''} |")
    whole = [cell for name in seconds for cell in (f"{sums[name]:.3f}", "", "")]
    first, second = sums.values()
    return "\n".join([*lines, f"| all | {' | '.join(whole)} | {first / second:.2f} |"])


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=3)
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--theirs", default="diffusers", help="or `diffusers, channels_last`")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    contenders = networks(options.tiny)
    pair = Pair.draw(options.size, models.shapes(options.tiny).unet.cross_attention_dim)
    pairs = {contest.OURS: our_call, options.theirs: diffusers_calls.unet_call}
    calls = {name: make(contenders[name], pair) for name, make in pairs.items()}
    flops = {name: flops_by_kind(contenders[name], call) for name, call in calls.items()}  # which warms up, too
    rounds = [{name: seconds_by_kind(call) for name, call in calls.items()} for _ in range(options.rounds)]
    kinds = [*dict.fromkeys(KINDS.values()), REST]
    seconds = {n: {k: statistics.median(one[n].get(k, 0.0) for one in rounds) for k in kinds} for n in calls}
    peak = contest.gemm_peak(options.tiny)
    print(f"\nUNet forward, 2 x {options.size} x {options.size} latents\n\n{table(seconds, flops, peak)}")
    print(f"\n{contest.machine(options.threads, peak)}; {options.rounds} rounds")


if __name__ == "__main__":
    main()
