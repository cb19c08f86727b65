"""The peak memory of a process: Stipple against diffusers, each in new processes, from the same folder.

python -m benchmarks.speed.peak_memory --workdir DIR \\
    --cases import:0 unet:32 unet:64 decode:512 pipeline:256 pipeline:512

Each contender opens the folder as its user would. The number is the kernel's (ru_maxrss), including pages of mapped
files. The case `import` is a process that only imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shared import contest  # without torch: child processes inherit the peak of their parent
from benchmarks.shared.processes import contend

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

CASES = ("import:0", "unet:32", "unet:64", "decode:512", "pipeline:256", "pipeline:512")
SAVINGS = {
    "decode": ("slicing", "tiling"),
    "pipeline": ("slicing", "tiling", "attention slicing"),
}  # options of diffusers
THEIRS = "diffusers"


def our_result(kind: str, size: int, folder: Path, options: argparse.Namespace) -> float:
    """Run a case with Stipple; returns a number that depends on its output."""
    from ldm import TextToImage

    if kind == "import":
        return 0.0
    import torch

    from autoencoder import Autoencoder
    from benchmarks.shared.inputs import ImageRequest, Pair, normal
    from benchmarks.speed.text_to_picture import our_draw
    from benchmarks.speed.unet_forward import our_call
    from ldm.formats.diffusers.networks_folder import load_unet
    from stipple_core.operators.winograd import lay_out

    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        if kind == "unet":
            unet = lay_out(load_unet(folder))
            return _size(our_call(unet, Pair.draw(size, unet.config.cross_attention_dim, options.batch))())
        if kind == "decode":
            autoencoder = lay_out(Autoencoder.load(folder))
            side = size // autoencoder.downsampling
            return _size(autoencoder.decode(normal(options.batch, 4, side, side)))
    return _brightness(
        our_draw(TextToImage.load(folder), ImageRequest(size, options.batch, options.steps), lambda: None)
    )


def their_result(kind: str, size: int, folder: Path, saving: str | None, options: argparse.Namespace) -> float:
    """Run a case with diffusers; returns the number of `our_result`."""
    if kind == "import":
        from diffusers import StableDiffusionPipeline  # noqa: F401

        return 0.0
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from benchmarks.peers import diffusers_calls
    from benchmarks.shared.inputs import ImageRequest, Pair, normal

    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        if kind == "unet":
            unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
            return _size(
                diffusers_calls.unet_call(unet, Pair.draw(size, unet.config.cross_attention_dim, options.batch))()
            )
        if kind == "decode":
            vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
            diffusers_calls.save_memory(saving, vae)
            side = size // 2 ** (len(vae.config.block_out_channels) - 1)
            return _size(diffusers_calls.decode_call(vae, normal(options.batch, 4, side, side))())
    pipeline = diffusers_calls.open_pipeline(folder, saving=saving)
    return _brightness(diffusers_calls.draw(pipeline, ImageRequest(size, options.batch, options.steps), lambda: None))


def _size(output: Tensor) -> float:
    return output.abs().mean().item()


def _brightness(pictures: Sequence[Image.Image]) -> float:
    import numpy as np

    return float(np.mean([np.asarray(picture).mean() for picture in pictures]))


def child(options: argparse.Namespace) -> dict[str, float]:
    """Run one contender in this process; returns its peak in MiB and its result."""
    folder, (kind, size) = Path(options.folder), options.cases[0].split(":")
    if options.contender == contest.OURS:
        result = our_result(kind, int(size), folder, options)
    else:
        saving = options.contender.partition(", ")[2] or None
        result = their_result(kind, int(size), folder, saving, options)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "result": result}  # KiB, on Linux


def race(case: str, folder: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return MiB of the processes of each contender, which alternate. Results must be equal, except with tiling."""
    flags = ["--threads", options.threads, "--batch", options.batch, "--steps", options.steps, "--folder", folder]
    names = [contest.OURS, THEIRS, *(f"{THEIRS}, {saving}" for saving in SAVINGS.get(case.split(":")[0], ()))]
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        results = {}
        for name in names:
            found = contend("speed.peak_memory", "--contender", name, "--cases", case, *flags)
            peaks[name].append(found["peak"])
            results[name] = found["result"]
            contest.note(f"{case}, {name}: {found['peak']:.0f} MiB, result {found['result']:.5g}")
            if "tiling" not in name and abs(found["result"] - results[contest.OURS]) > 1e-3 * abs(found["result"]):
                raise RuntimeError(f"{case}: {results} differ; there is nothing to compare")
    return peaks


def table(peaks: dict[str, dict[str, list[float]]]) -> str:
    """Return a Markdown table with a row per case and contender."""
    lines = ["| case | contender | peak MiB (least - most) | ratio: ours / it |", "|---|---|---|---|"]
    for case, by_name in peaks.items():
        for name, values in by_name.items():
            spread = f"{statistics.median(values):.0f} ({min(values):.0f} - {max(values):.0f})"
            ratio = "" if name == contest.OURS else contest.ratios(by_name[contest.OURS], values)
            lines.append(f"| {case} | {name} | {spread} | {ratio} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=3)
    parser.add_argument("--workdir", default=contest.WORKDIR, help="where the model is written to")
    parser.add_argument("--cases", nargs="+", default=CASES, help="import:0, unet:SIDE, decode:PIXELS, pipeline:PIXELS")
    parser.add_argument("--batch", type=int, default=1, help="pictures together")
    parser.add_argument("--steps", type=int, default=2, help="of pipelines")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # the contender that this process runs
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.contender is not None:
        print(json.dumps(child(options)))
        return
    folder = contend("shared.model_folder", "--workdir", options.workdir, *["--tiny"] * options.tiny)["folder"]
    peaks = {case: race(case, folder, options) for case in options.cases}
    print(f"\nPeak memory, batch {options.batch}\n\n{table(peaks)}\n\n{contest.machine(options.threads)}")


if __name__ == "__main__":
    main()
