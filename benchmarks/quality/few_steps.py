"""A student in few steps against its teacher in many: prompt recall, CPU time, and a sheet of images.

python -m benchmarks.quality.few_steps --student runs/emoji-guidance/model --data data/emoji \\
    --output docs/tasks/few_steps.png

Both draw the same prompts from the same seeds, in turns. The time is the CPU time of this process on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality.prompt_recall import RecallScorer, read_pictures, stack
from benchmarks.quality.recall import small_rgb
from benchmarks.quality.recall_prompts import KINDS, Case, choose_cases, read_metadata
from ldm import TextToImage
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.config import load_config, one_line_errors
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.sources.scan import scan
from stipple_core.images.images import grid

REFERENCES, SHOWN = 200, 8  # training images whose prompts are drawn; images of each way on the sheet
TEACHER = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 4.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A model with the settings that it is sampled with."""

    name: str
    model: TextToImage
    settings: dict[str, Any]  # arguments of `TextToImage.__call__`


@dataclasses.dataclass
class Made:
    """The images of one `Way`, and the CPU time of sampling them."""

    pictures: list[Image.Image]
    seconds: float = 0.0


def ways(teacher: TextToImage, student: TextToImage) -> list[Way]:
    """Return the teacher with its steps and with those of the student, and the student with its defaults."""
    few = student.defaults.steps
    return [
        Way(name="teacher, guided", model=teacher, settings=TEACHER),
        Way(name="teacher, guided, few steps", model=teacher, settings=TEACHER | {"steps": few}),
        Way(name="student", model=student, settings={}),
    ]


def draw(all_ways: Sequence[Way], cases: Sequence[Case], kind: str, batch: int) -> dict[str, Made]:
    """Draw the images of all cases in batches, with each way in turn. Case i has seed i."""
    made = {way.name: Made([]) for way in all_ways}
    for first in range(0, len(cases), batch):
        prompts = [case.prompts[kind] for case in cases[first : first + batch]]
        for way in all_ways:
            began = time.process_time()
            found = way.model(prompts, batch_size=batch, seed=first, **way.settings)
            made[way.name].seconds += time.process_time() - began
            made[way.name].pictures += found
    return made


def measure(
    teacher: TextToImage, student: TextToImage, data: str, config_path: str, limit: int, kind: str, batch: int
) -> tuple[dict[str, Any], Image.Image]:
    """Return the results of each way, and a sheet of the first cases with a row per way and the prompts below."""
    config = load_config(LdmRunConfig, config_path, [f"data.folder={data}"])
    records = scan(config.data)
    cases = choose_cases(records.train, read_metadata(data), REFERENCES, seed=0)
    references = read_pictures(ImageDataset(records.train, config.data), [case.index for case in cases])
    scorer = RecallScorer(teacher.autoencoder, references, small_rgb(references), torch.arange(len(references)))
    all_ways, cases = ways(teacher, student), cases[:limit]
    made = draw(all_ways, cases, kind, batch)
    results = {}
    for way in all_ways:
        score, plan = scorer.score(stack(made[way.name].pictures)), way.model.plan("", **way.settings)[0]
        results[way.name] = {
            **{name: getattr(plan, name) for name in ("sampler", "steps", "guidance_scale")},
            "seconds_per_picture": made[way.name].seconds / len(cases),
            **{f"{of}_at_{k}": score[of][f"at_{k}"]["value"] for of in ("rgb", "latents") for k in (1, 5)},
        }
    shown = min(SHOWN, len(cases))
    pictures = [picture for way in all_ways for picture in made[way.name].pictures[:shown]]
    prompts = [case.prompts[kind] for case in cases[:shown]]
    return results, grid(pictures, shown, [*[""] * shown * (len(all_ways) - 1), *prompts])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="checkpoints/emoji", help="model folder")
    parser.add_argument("--student", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="the folder of images that the teacher was trained on")
    parser.add_argument("--config", default="configs/ldm/emoji.yaml", help="the stage-2 config it was trained by")
    parser.add_argument("--output", help="PNG file of the sheet")
    parser.add_argument("--limit", type=int, default=REFERENCES, help="pictures of each way")
    parser.add_argument("--kind", choices=KINDS, default="caption", help="of prompts")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures computed together")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with one_line_errors():
        teacher, student = TextToImage.load(options.teacher), TextToImage.load(options.student)
        settings = options.data, options.config, options.limit, options.kind, options.batch_size
        results, sheet = measure(teacher, student, *settings)
    print(json.dumps(results, indent=2))
    if options.output:
        sheet.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
