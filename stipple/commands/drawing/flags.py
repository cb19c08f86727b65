"""The flags of the drawing commands: a row for each, named after the field that it sets.

Every field of `ldm.sampling.settings.Settings` requires a row. Comments of fields describe values in Python; help texts
describe what is written on a command line.
"""

from __future__ import annotations

from typing import Any

from stipple.commands.drawing.drawing_request import SEED
from stipple.commands.drawing.open_model import CHECKPOINT, DTYPES

Flag = tuple[tuple[str, ...], dict[str, Any]]


def flag(*others: str, **options: Any) -> Flag:
    """Return other spellings of a flag, and its options for argparse."""
    return others, options


def number(metavar: str, text: str) -> Flag:
    """Return a flag whose value is a number."""
    return flag(type=float, metavar=metavar, help=text)


def count(metavar: str, text: str, *others: str) -> Flag:
    """Return a flag whose value is a whole number."""
    return flag(*others, type=int, metavar=metavar, help=text)


PICTURE: dict[str, Flag] = {  # fields of `ldm.sampling.settings.Settings`: recorded in the PNG, and read by --like
    "negative_prompt": flag(metavar="TEXT", help="what the picture should not show"),
    "also": flag(
        action="append",
        metavar="'W TEXT'",
        help="a further prompt with its weight, which may be negative; repeatable",
    ),
    "guidance_scale": flag(
        *("--scale", "--cfg-scale"),
        type=float,
        metavar="W",
        help="how closely to follow the prompt; 1: no guidance (default: the model's)",
    ),
    "guidance_method": flag(metavar="NAME", help="`help` lists them (default: classifier_free)"),
    "guidance_rescale": number("PHI", "reduce the contrast that guidance adds: 0 not at all, 0.7 usual, 1 completely"),
    "guidance_start": number("T", "guide only from this time on; 1 is noise (default: 1)"),
    "guidance_stop": number("T", "guide only down to this time; 0 is the picture (default: 0)"),
    "guidance_bound": number("B", "clip estimated latents to -B..B; 4 is usual (default: no bound)"),
    "guidance_percentile": number("P", "scale estimates so that P percent are within the bound; 99.5 is usual"),
    "guidance_norm": number("R", "apg: largest norm of the guidance of a picture (default: no limit)"),
    "perturbed_scale": number("S", "perturbed_attention: its scale (default: 3)"),
    "classifier_scale": number("S", "scale of the gradient of --classifier; 1 to 10 are usual (default: 0, off)"),
    "classifier_class": flag(metavar="NAME", help="class for --classifier (default: the prompt)"),
    "clip_scale": number("S", "scale of the gradient of --clip-guidance (default: 0, off)"),
    "clip_prompt": flag(metavar="TEXT", help="text for --clip-guidance (default: the prompt)"),
    "steps": count("N", "sampling steps (default: the model's)", "--ddim-steps"),
    "sampler": flag(metavar="NAME", help="`help` lists them (default: the model's)"),
    "spacing": flag(metavar="NAME", help="spacing of the sampling times; `help` lists them (default: the model's)"),
    "eta": flag(type=float, help="ddim: share of new noise at each step, 0 to 1"),
    "churn": number("S", "heun: noise that is added and removed, over all steps; 40 is usual"),
    "variance": flag(metavar="NAME", help="ddpm: small, large, or learned by the model (default: small)"),
    "corrections": count("N", "langevin, predictor_corrector: Langevin steps at each noise level"),
    "tolerance": number("E", "ode: largest error of a step (default: 0.001)"),
    "shift": number("S", "rectified flow: shift times towards noise; 3 is usual for large pictures"),
    "reuse": count("N", "compute inner layers only at every Nth call: faster, not exact (default: 1)"),
    "height": count("PIXELS", "height of the picture (default: as trained)", "-H"),
    "width": count("PIXELS", "width of the picture (default: as trained)", "-W"),
    "window": count("N", "for large pictures: denoise windows of N x N latents and blend them"),
    "overlap": count("N", "latents that neighboring windows share (default: half a window)"),
}
INPUTS: dict[str, Flag] = {  # also fields of Settings: what a picture is made from besides prompts
    "image": flag(metavar="FILE", help="picture to change, repaint, enlarge or imitate"),
    "mask": flag(metavar="FILE", help="mask of the image: white pixels are repainted"),
    "map": flag(metavar="FILE", help="class or depth of each pixel, for models that are conditioned on maps"),
    "strength": number("S", "how much of the image changes: the share of the steps that is taken, up to 1"),
    "resample": count("N", "with a mask: repeat each part of the sampling N times; 5 to 10 are usual"),
    "feather": count("PIXELS", "with a mask: width of the soft transition around it (default: 0)"),
    "back_projection": count("N", "upscaling: rounds that match the result to the image (default: the model's)"),
    "noise_level": number("L", "upscaling: noise added to the image, for models trained so; 0 to 1"),
}
MODEL: dict[str, Flag] = {  # fields of `stipple.commands.drawing.open_model.Opening`
    "checkpoint": flag(metavar="PATH", help=f"model folder, or .ckpt or .safetensors file (default: {CHECKPOINT})"),
    "config_yaml": flag("--yaml", metavar="FILE", help="single file: its YAML config in CompVis' format"),
    "tokenizer": flag(metavar="FOLDER", help="single file: its tokenizer (default: the usual one of its text encoder)"),
    "prediction": flag(metavar="NAME", help="single file: what its network predicts: noise, velocity or clean"),
    "variant": flag(metavar="NAME", help="model folder: which of its weight files, such as fp16"),
    "guidance_model": flag(metavar="PATH", help="autoguidance: a weaker version of the model"),
    "prior": flag(metavar="PATH", help="decoders of image embeddings: the model that makes embeddings from prompts"),
    "classifier": flag(metavar="PATH", help="guide by a classifier that `stipple train-classifier` wrote"),
    "clip_guidance": flag(metavar="NAME", help="guide by a CLIP: an architecture of open_clip, or a folder"),
    "clip_pretrained": flag(metavar="TAG", help="weights of --clip-guidance: a tag of open_clip, or a file"),
    "lora": flag(action="append", metavar="PATH:WEIGHT", help="add a LoRA; weight 1: as trained, 0: off; repeatable"),
    "embedding": flag(action="append", metavar="PATH", help="add a word learned by textual inversion; repeatable"),
    "precision": flag(choices=["auto", *DTYPES], help="auto (default): fp16 on CUDA, fp32 elsewhere"),
    "device": flag(default="auto", help="auto (default), cpu, cuda, cuda:1 or mps"),
    "decode_memory": number("GIB", "decode in tiles where decoding needs more memory (default: 2)"),
    "keep_transforms": flag(action="store_true", help="CPU: faster, for 4 times the memory of the convolutions"),
}
RUN: dict[str, Flag] = {  # which prompts, how many pictures, and where they are written
    "prompt": flag(action="append", default=[], help="a prompt; the same as a word without a flag; repeatable"),
    "from_file": flag(metavar="FILE", help="read prompts: one per line, or a JSON object with its own settings"),
    "like": flag(metavar="FILE.png", help="draw a picture again, equal to the last byte; other flags change it"),
    "num_images": count("N", "pictures per prompt (default: 1)", "-n"),
    "batch_size": count("N", "pictures that are computed together (default: 1 on a CPU, else 4)"),
    "seed": flag(type=int, help=f"seed of the first picture; picture i has seed + i; -1: random (default: {SEED})"),
    "outdir": flag(default="outputs", metavar="FOLDER", help="numbered PNG files are written here (default: outputs)"),
    "grid": flag(action="store_true", help="also write one image with all pictures"),
    "preview_every": count("N", "write a preview every N steps"),
    "no_metadata": flag(action="store_true", help="do not record in the PNG files how they were made"),
}
FLAGS: dict[str, Flag] = {**PICTURE, **INPUTS, **MODEL, **RUN}
FIRST = ("checkpoint", "num_images", "seed", "steps", "guidance_scale", "negative_prompt", "sampler", "outdir", "like")
GUIDING = ("guidance", "perturbed", "classifier", "clip")  # beginnings of names of flags
GROUPS: dict[str, tuple[str, ...]] = {  # of --help; a flag of FIRST, or of a command's own first ones, is not repeated
    "input images": tuple(INPUTS),
    "sampling": ("spacing", "eta", "churn", "variance", "corrections", "tolerance", "shift", "reuse"),
    "guidance": ("also", *(name for name in PICTURE if name.startswith(GUIDING))),
    "size": ("height", "width", "window", "overlap"),
    "model": tuple(MODEL),
    "prompts and files": tuple(RUN),
}
