"""Make pictures from prompts.

python txt2img.py "a red heart" "a blue fish"
python txt2img.py --from-file prompts.txt --guidance-scale 4 --num-images 4 --grid
python txt2img.py --like outputs/00007.png --steps 100
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.config import one_line_errors, short_warnings
from storage.pictures import (
    PARAMETERS,
    RECORD,
    a1111_parameters,
    check_writable,
    encode_png,
    model_hash,
    read_record,
    replace_file,
    write_numbered,
)
from storage.prompts import known_settings, read_prompts

if TYPE_CHECKING:  # torch takes seconds to import: what makes pictures imports it, so that --help answers at once
    from PIL import Image
    from torch import Tensor

    from ldm.pipeline import Picture, TextToImage
    from ldm.settings import Settings

HERE = Path(__file__).resolve().parent
CHECKPOINT = "checkpoints/emoji"  # in the folder of this script
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FLAGS = (
    *("negative_prompt", "also", "guidance_scale", "guidance_method", "guidance_rescale", "guidance_start"),
    *("guidance_stop", "guidance_bound", "guidance_percentile", "guidance_norm", "perturbed_scale", "steps", "sampler"),
    *("spacing", "eta", "churn", "variance", "tolerance", "shift", "reuse", "height", "width", "num_images"),
)
OPENING = ("config_yaml", "tokenizer", "prediction", "variant")  # flags that say how to open the checkpoint
SEED = 42
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parser() -> Parser:
    """The command line; a flag that is left out is None, which leaves the choice to the model."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = p.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to show; one or several")
    add("--prompt", action="append", default=[], help="the same, as a flag")
    add("--from-file", metavar="FILE", help="one prompt per line, or a JSON object with its own settings")
    add("--like", metavar="FILE.png", help="make a picture again, the same to the last byte; other flags change it")
    add("--checkpoint", metavar="PATH", help=f"model folder, or .ckpt or .safetensors file (default: {CHECKPOINT})")
    add("--yaml", dest="config_yaml", metavar="FILE", help="CompVis' YAML of a checkpoint that is a file")
    add("--tokenizer", metavar="FOLDER", help="of a checkpoint that is a file; default: the one its kind is known for")
    add("--prediction", metavar="NAME", help="of a checkpoint that is a file: what it outputs: noise, velocity, clean")
    add("--variant", metavar="NAME", help="of a checkpoint that is a folder: which of its weights, such as fp16")
    add("--negative-prompt", metavar="TEXT", help="what to lead away from")
    add(
        "--also", action="append", metavar="'W TEXT'", help="what else to show, by a weight; below 0 leads away from it"
    )
    add("--guidance-scale", "--scale", "--cfg-scale", type=float, metavar="W", help="1: none; default: the model's")
    add("--guidance-method", metavar="NAME", help="`help` lists them (default: classifier_free)")
    add("--guidance-model", metavar="PATH", help="of autoguidance: a weaker version of the checkpoint")
    add("--guidance-rescale", type=float, metavar="PHI", help="take back added contrast: 0 none, 0.7 usual, 1 all")
    add("--guidance-start", type=float, metavar="T", help="guide only at times from here, 1: noise (default: 1)")
    add("--guidance-stop", type=float, metavar="T", help="down to here, 0: the picture (default: 0)")
    add("--guidance-bound", type=float, metavar="B", help="clip estimated latents to B; 4 is usual (default: no bound)")
    add("--guidance-percentile", type=float, metavar="P", help="scale them so that P percent are within it; 99.5 usual")
    add("--guidance-norm", type=float, metavar="R", help="of apg: longest difference to be guided by (default: any)")
    add("--perturbed-scale", type=float, metavar="S", help="of perturbed_attention (default: 3)")
    add("--steps", "--ddim-steps", type=int, metavar="N", help="sampling steps; default: the model's")
    add("--sampler", metavar="NAME", help="`help` lists them; default: the model's")
    add("--spacing", metavar="NAME", help="of its times; `help` lists them; default: the model's")
    add("--eta", type=float, help="of ddim: noise drawn anew at each step, 0 to 1")
    add("--churn", type=float, metavar="S", help="of heun: noise added and taken away, over all steps; 40 is usual")
    add("--variance", metavar="NAME", help="of ddpm: small, large, or learned by the model (default: small)")
    add("--tolerance", type=float, metavar="E", help="of ode: largest error of a step (default: 0.001)")
    add("--shift", type=float, metavar="S", help="of a rectified flow's times, 3 is usual for large pictures")
    add("--reuse", type=int, metavar="N", help="faster, not exact: compute inner layers at every Nth call (default: 1)")
    add("--height", "-H", type=int, metavar="PIXELS", help="default: as trained")
    add("--width", "-W", type=int, metavar="PIXELS", help="default: as trained")
    add("--num-images", "-n", type=int, metavar="N", help="pictures per prompt (default: 1)")
    add("--batch-size", type=int, metavar="N", help="pictures computed together (default: 1 on a CPU, else 4)")
    add("--seed", type=int, help=f"of the first picture, picture i has seed + i; -1: random (default: {SEED})")
    add("--outdir", default="outputs", metavar="FOLDER", help="pictures are numbered in it, never overwritten")
    add("--grid", action="store_true", help="also write all pictures as one")
    add("--precision", choices=["auto", *DTYPES], help="auto: fp16 on CUDA, else fp32")
    add("--keep-transforms", action="store_true", help="on a CPU: more speed for 4 times the convolutions' memory")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--preview-every", type=int, metavar="N", help="show the running estimate in a PNG every N steps")
    add("--no-metadata", action="store_true", help="do not write into PNG files how they were made")
    return p


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; flags may be spelled with underscores, and `--` ends them."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags = [_dashes(word) if word.startswith("--") else word for word in argv[:end]]
    arguments = parser().parse_args([*flags, *argv[end:]])
    for name in ("num_images", "batch_size", "preview_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if arguments.also is not None:
        arguments.also = "\n".join(arguments.also)
    return arguments


def _dashes(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def read_jobs(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What to make: arguments of `TextToImage.plan`, one dict per prompt; and the record of --like, or {}."""
    flags = {name: getattr(arguments, name) for name in FLAGS if getattr(arguments, name) is not None}
    jobs = [flags | {"prompt": prompt} for prompt in [*arguments.prompts, *arguments.prompt]]
    if arguments.from_file is not None:
        jobs += [flags | line for line in read_prompts(Path(arguments.from_file), ("prompt", "seed", *FLAGS))]
    record = {} if arguments.like is None else read_record(Path(arguments.like))
    if record:
        known = ("prompt", "seed", "batch", "place", *FLAGS)
        pictures = record["pictures"] if isinstance(record.get("pictures"), list) else [None]
        pictures = [known_settings(picture, known, f"the record in {arguments.like}") for picture in pictures]
        if arguments.seed is not None:
            pictures = [{k: v for k, v in picture.items() if k != "seed"} for picture in pictures]
        jobs = [picture | job for job in jobs or [flags] for picture in pictures]
        arguments.grid |= len(pictures) > 1
    if not jobs:
        raise ValueError('there is no prompt; give one, as in: txt2img.py "a red heart"')
    return list(number(jobs, SEED if arguments.seed is None else arguments.seed)), record


def number(jobs: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Give each job a seed: its own, or else `seed` (-1: random) plus the number of pictures before it.

    Raises:
        ValueError: settings that are wrong with any model, found before one is loaded.
    """
    from ldm.settings import Settings, random_seed, with_usual_scale

    seed, count = random_seed() if seed == -1 else seed, 0
    for job in jobs:
        job = {"seed": seed + count, "prompt": ""} | {name: value for name, value in job.items() if value is not None}
        job = with_usual_scale(job)
        if job["seed"] == -1:
            job["seed"] = random_seed()
        Settings(**{name: value for name, value in job.items() if name != "num_images"})
        images = job.get("num_images", 1)
        if not isinstance(images, int) or images < 1:
            raise ValueError(f"num_images {images!r} must be a whole number, at least 1")
        count += images
        yield job


def find_checkpoint(given: str | None, recorded: str | None) -> Path:
    """The model: as given; else as a picture's record says, from here or this script's folder; else ours."""
    from ldm.parts import read_index

    places = [Path(given)] if given else [HERE / (recorded or CHECKPOINT), Path(recorded or CHECKPOINT)]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        name = given or recorded or CHECKPOINT
        raise FileNotFoundError(f"checkpoint {name} does not exist; give a model folder or file with --checkpoint")
    if path.is_dir():
        read_index(path)
    return path


def find_device(name: str) -> str:
    """A device that is there."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if name == "auto" else name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not here; use auto, which is {best} on this machine") from None
    return str(device)


def load_model(arguments: argparse.Namespace, record: Mapping[str, Any]) -> tuple[TextToImage, dict[str, str]]:
    """The model, and what there is to record of it."""
    import torch

    from ldm.pipeline import TextToImage

    recorded = record.get("checkpoint")
    path = find_checkpoint(arguments.checkpoint, None if recorded is None else str(recorded))
    device = find_device(arguments.device)
    kind = torch.device(device).type
    precision = arguments.precision or (record.get("precision") if record.get("device") == kind else "auto")
    if precision not in DTYPES:
        precision = "fp16" if kind == "cuda" else "fp32"
    sign = model_hash(path)
    if record.get("model_hash", sign) != sign and arguments.checkpoint is None:
        was = record["model_hash"]
        warnings.warn(f"{arguments.like} was made by model {was}, this is {sign}: it will differ", stacklevel=1)
    again = {} if arguments.checkpoint else record  # of another checkpoint it says nothing
    opening = {name: getattr(arguments, name) or again.get(name) for name in OPENING}
    opening = {name: str(value) for name, value in opening.items() if value}
    dtype, keep = getattr(torch, DTYPES[precision]), arguments.keep_transforms
    model = TextToImage.load(path, device, dtype, **opening, keep_transforms=keep)
    weaker = arguments.guidance_model or again.get("guidance_model")
    if weaker is not None:
        opening["guidance_model"] = str(weaker)
        model.guide_by(TextToImage.load(weaker, device, dtype, keep_transforms=keep))
    about = {"checkpoint": arguments.checkpoint or recorded or CHECKPOINT, "model_hash": sign, "precision": precision}
    return model, about | opening | {"device": kind, "torch": torch.__version__}


class Output:
    """Where pictures go, and what is written into them.

    Args:
        folder: made when the first picture is written.
        about: what there is to record of the model; None: write no metadata.
    """

    def __init__(self, folder: Path, about: Mapping[str, str] | None):
        self.folder, self.about, self.preview_path = folder, about, None

    def write(self, image: Image.Image, pictures: Sequence[Settings], prefix: str = "", digits: int = 5) -> Path:
        """Write an image with how it, or the pictures in it, were made."""
        texts = {}
        if self.about is not None:
            records = [asdict(picture) for picture in pictures]
            name = Path(self.about["checkpoint"]).name
            texts[PARAMETERS] = a1111_parameters(records[0], name, self.about["model_hash"])
            texts[RECORD] = json.dumps({**self.about, "pictures": records})
        return write_numbered(encode_png(image, texts), self.folder, prefix, digits)

    def preview(self, model: TextToImage, z_0: Tensor) -> None:
        """Show estimates of clean latents [B, c, h, w] in one file of this run's own."""
        from storage.images import grid

        images = model.preview(z_0)
        data = encode_png(grid(images, columns(images)) if len(images) > 1 else images[0], {})
        if self.preview_path is None:
            self.preview_path = write_numbered(data, self.folder, "preview-", 4)
            print(f"preview: {self.preview_path}", file=sys.stderr)
        else:
            replace_file(data, self.preview_path)


def columns(images: Sequence[Image.Image]) -> int:
    """How wide a grid is that is as square as can be."""
    return math.isqrt(len(images) - 1) + 1


def make(
    model: TextToImage, batches: Sequence[list[Settings]], output: Output, preview_every: int | None
) -> Iterator[Picture]:
    """Make the pictures of all batches under a progress bar; write each, print its path, and yield it."""
    from tqdm import tqdm

    with tqdm(total=sum(batch[0].steps for batch in batches), unit="step", disable=None) as bar:
        for batch in batches:
            for step in model.sample(batch):
                bar.update()
                if preview_every and (step.index + 1) % preview_every == 0:
                    with one_line_errors():
                        output.preview(model, step.z_0)
            with one_line_errors():
                for picture in model.finish(batch, step.z):
                    path = output.write(picture.image, [picture.settings])
                    tqdm.write(str(path), file=sys.stdout)
                    sys.stdout.flush()
                    yield picture


def run(argv: Sequence[str]) -> None:
    """Check all that can be checked, load the model, make the pictures."""
    with one_line_errors():
        arguments = read_arguments(argv)
        if "help" in (arguments.sampler, arguments.guidance_method, arguments.spacing):
            return list_choices(arguments)
        jobs, record = read_jobs(arguments)
        if arguments.guidance_model and all(job.get("guidance_method") != "autoguidance" for job in jobs):
            raise ValueError("--guidance-model is for --guidance-method autoguidance; give both, or none")
        check_writable(Path(arguments.outdir))
        model, about = load_model(arguments, record)
        pictures = [picture for job in jobs for picture in model.plan(**job)]
        if record and arguments.batch_size is None and arguments.num_images is None:
            batches = [[picture] * picture.batch for picture in pictures]  # see TextToImage.finish
        else:
            batches = list(model.batches(pictures, arguments.batch_size or model.default_batch))
    output = Output(Path(arguments.outdir), None if arguments.no_metadata else about)
    made = [picture for picture in make(model, batches, output, arguments.preview_every) if arguments.grid]
    if made:
        from storage.images import grid

        images = [picture.image for picture in made]
        with one_line_errors():
            print(output.write(grid(images, columns(images)), [p.settings for p in made], "grid-", 4))


def list_choices(arguments: argparse.Namespace) -> None:
    """Print a line for each sampler, guidance method or spacing, whichever `help` was asked for."""
    from ldm.guidances import GUIDANCES
    from ldm.samplers import SAMPLERS
    from ldm.times import SPACINGS

    asked = {"sampler": SAMPLERS, "guidance_method": GUIDANCES, "spacing": SPACINGS}
    for flag, choices in asked.items():
        if getattr(arguments, flag) == "help":
            for name, choice in choices.items():
                does = choice.summary if flag != "spacing" else (choice.__doc__ or "").splitlines()[0]
                print(f"{name:21}{does}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 after a user's mistake, with 130 after Ctrl-C."""
    try:
        with short_warnings():
            run(sys.argv[1:] if argv is None else argv)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        print("error: there is not enough memory; use a smaller --height and --width, or --batch-size", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; finished pictures are kept", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
