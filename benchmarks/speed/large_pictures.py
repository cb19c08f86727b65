"""The memory and time of a large image in Stable Diffusion's KL autoencoder with random weights: whole, and in tiles.

python -m benchmarks.speed.large_pictures --sizes 1024 --memory 0 2 1

Each case is a process of its own, whose peak memory is the kernel's (ru_maxrss), including torch and the weights.
--memory is in GiB; 0 is the whole image at once. The difference between tiles and the whole image is listed pixel by
pixel, in units of 1/255.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shared import contest  # without torch: child processes inherit the peak of their parent
from benchmarks.shared.processes import contend

HEADER = "| GiB for maps | peak MiB | seconds | CPU s | std | largest difference |\n|---|---|---|---|---|---|"


def child(options: argparse.Namespace) -> dict[str, float]:
    """Run one case in this process and write its result to the working folder."""
    import numpy as np
    import torch

    from autoencoder import Autoencoder
    from benchmarks.shared.models import shapes
    from stipple_core.operators.winograd import lay_out

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    autoencoder = lay_out(Autoencoder(shapes(options.tiny).vae).eval())
    gibibytes, size = options.memory[0], options.sizes[0]
    autoencoder.memory = round(gibibytes * 2**30) or None
    side = size // autoencoder.downsampling
    inputs = torch.randn(1, 4, side, side) if options.way == "decode" else torch.rand(1, 3, size, size) * 2 - 1
    results = []
    with torch.inference_mode():
        run = autoencoder.decode if options.way == "decode" else lambda images: autoencoder.encode(images).mode()
        wall, cpu = contest.measure(lambda: results.append(run(inputs)))
    np.save(Path(options.workdir) / f"{gibibytes}.npy", results[0].numpy())
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "wall": wall, "cpu": cpu}


def compare(workdir: str, names: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Return, per case, the standard deviation of its result and its largest difference from the first, in 1/255."""
    import numpy as np

    results = {name: np.load(Path(workdir) / f"{name}.npy") * 127.5 for name in names}
    first = results[names[0]]
    return {name: (float(x.std()), float(np.abs(x - first).max())) for name, x in results.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="sides of the pictures in pixels")
    parser.add_argument("--memory", type=float, nargs="+", default=[0.0, 2.0, 1.0], help="GiB for feature maps; 0: any")
    parser.add_argument("--way", choices=["decode", "encode"], default="decode")
    parser.add_argument("--workdir", help=argparse.SUPPRESS)  # working folder of a case
    options = parser.parse_args(argv)
    if options.workdir is not None:
        print(json.dumps(child(options)))
        return
    flags = ["--threads", options.threads, "--way", options.way, *["--tiny"] * options.tiny]
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as workdir:
            found = {}
            for memory in options.memory:
                case = ["--sizes", size, "--memory", memory, "--workdir", workdir]
                found[memory] = contend("speed.large_pictures", *case, *flags)
                contest.note(f"{options.way} {size}, {memory} GiB: {found[memory]}")
            far = compare(workdir, options.memory)
        print(f"\n{options.way} {size} x {size}\n\n{HEADER}")
        for memory, case in found.items():
            numbers = f"{case['peak']:.0f} | {case['wall']:.1f} | {case['cpu']:.1f}"
            print(f"| {memory:g} | {numbers} | {far[memory][0]:.2f} | {far[memory][1]:.2g} |")
    print(f"\n{contest.machine(options.threads)}")


if __name__ == "__main__":
    main()
