"""Whole pipelines from prompt to image: Stipple against diffusers' StableDiffusionPipeline, from the same folder.

python -m benchmarks.speed.text_to_picture --workdir DIR --sizes 256 512 --batches 1 4 --steps 20 --rounds 3

The model has Stable Diffusion 1.5's shapes and random weights in float32; the sampler is DDIM with guidance scale 7.5
and the same seeds. The folder (4.3 GB) is written once. Below each table are the seconds per step, and the seconds
after the last step (decoding).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from benchmarks.peers import diffusers_calls
from benchmarks.shared import contest
from benchmarks.shared.inputs import GUIDANCE_SCALE, PROMPT, SEED, ImageRequest
from benchmarks.shared.model_folder import model_folder
from ldm.pipeline import TextToImage

LAYOUTS = ("contiguous", "channels_last")
Draw = Callable[[ImageRequest, Callable[[], None]], list[Image.Image]]  # requested images; called after each step


@dataclass
class Contender:
    """A pipeline, its latest images, and the seconds of its parts."""

    draw: Draw
    steps: list[float] = field(default_factory=list)  # seconds per step, without the first step
    rest: list[float] = field(default_factory=list)  # seconds from the last step to the images
    pictures: list[Image.Image] = field(default_factory=list)

    def run(self, request: ImageRequest) -> None:
        """Draw the requested images once and record the times."""
        marks: list[float] = []
        self.pictures = self.draw(request, lambda: marks.append(time.perf_counter()))
        self.rest.append(time.perf_counter() - marks[-1])
        self.steps.append((marks[-1] - marks[0]) / max(1, len(marks) - 1))


def our_draw(model: TextToImage, request: ImageRequest, after_step: Callable[[], None]) -> list[Image.Image]:
    """Draw the requested images with Stipple's defaults, except for the batch size."""
    same = dict(guidance_scale=GUIDANCE_SCALE, steps=request.steps, sampler="ddim", seed=SEED)
    plan = model.plan(PROMPT, num_images=request.batch, height=request.size, width=request.size, **same)
    (batch,) = model.batches(plan, request.batch)
    for step in model.sample(batch):
        latents = step.z  # at the end: the latents of the last step
        after_step()
    return [picture.image for picture in model.finish(batch, latents)]


def race(pipelines: dict[str, Draw], request: ImageRequest, rounds: int) -> str:
    """Return the table of one size and batch. Images are compared after two steps and after all."""
    title = f"{request.batch} x {request.size} x {request.size} pixels, {request.steps} steps"
    for steps in dict.fromkeys((min(2, request.steps), request.steps)):
        contenders = {name: Contender(draw) for name, draw in pipelines.items()}
        now = ImageRequest(request.size, request.batch, steps)
        calls = {name: functools.partial(one.run, now) for name, one in contenders.items()}
        times = contest.alternate(calls, rounds if steps == request.steps else 1, warm_up=False)
        for name, one in contenders.items():
            contest.require_alike(contenders[contest.OURS].pictures, one.pictures, f"{title}, {steps} made, {name}")
    lines = [f"\n{title}\n\n{contest.table(times)}\n"]
    ours = contenders[contest.OURS]
    for name, one in contenders.items():
        compared = f"; ratio: ours / it {contest.ratios(ours.steps, one.steps)}, {contest.ratios(ours.rest, one.rest)}"
        step, rest = statistics.median(one.steps), statistics.median(one.rest)
        lines.append(f"- {name}: {step:.3f} s per step, {rest:.3f} s after the last" + compared * (one is not ours))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=3)
    parser.add_argument("--workdir", default=contest.WORKDIR, help="where the model is written to")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the pictures in pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="pictures made together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--theirs", nargs="+", choices=LAYOUTS, default=["channels_last"], help="layouts of diffusers'")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    folder = model_folder(options.workdir, options.tiny)
    pipelines: dict[str, Draw] = {contest.OURS: functools.partial(our_draw, TextToImage.load(folder))}
    for layout in options.theirs:
        pipeline = diffusers_calls.open_pipeline(folder, channels_last=layout == "channels_last")
        pipelines[f"diffusers, {layout}"] = functools.partial(diffusers_calls.draw, pipeline)
    for size in options.sizes:
        for batch in options.batches:
            print(race(pipelines, ImageRequest(size, batch, options.steps), options.rounds), flush=True)
    print(f"\n{contest.machine(options.threads, contest.gemm_peak(options.tiny))}; {options.rounds} rounds")


if __name__ == "__main__":
    main()
