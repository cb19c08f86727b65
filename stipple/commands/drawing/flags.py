"""The flags of the drawing commands: a row each, named like the field that it sets."""

from __future__ import annotations

from typing import Any

from stipple.commands.drawing.drawing_request import SEED
from stipple.commands.drawing.open_model import CHECKPOINT, DTYPES

Flag = tuple[tuple[str, ...], dict[str, Any]]


def flag(*others: str, **options: Any) -> Flag:
    """Other spellings of a flag, and what argparse is told of it."""
    return others, options


PICTURE: dict[str, Flag] = {  # fields of `ldm.sampling.settings.Settings`: recorded, and read again by --like
    "negative_prompt": flag(metavar="TEXT", help="what to lead away from"),
    "also": flag(
        action="append", metavar="'W TEXT'", help="what else to show, by a weight; below 0 leads away from it"
    ),
    "guidance_scale": flag(*("--scale", "--cfg-scale"), type=float, metavar="W", help="1: none; default: the model's"),
    "guidance_method": flag(metavar="NAME", help="`help` lists them (default: classifier_free)"),
    "guidance_rescale": flag(type=float, metavar="PHI", help="take back added contrast: 0 none, 0.7 usual, 1 all"),
    "guidance_start": flag(type=float, metavar="T", help="guide only at times from here, 1: noise (default: 1)"),
    "guidance_stop": flag(type=float, metavar="T", help="down to here, 0: the picture (default: 0)"),
    "guidance_bound": flag(type=float, metavar="B", help="clip estimated latents to B; 4 is usual (default: no bound)"),
    "guidance_percentile": flag(type=float, metavar="P", help="scale them so that P percent are within it; 99.5 usual"),
    "guidance_norm": flag(type=float, metavar="R", help="of apg: longest difference to be guided by (default: any)"),
    "perturbed_scale": flag(type=float, metavar="S", help="of perturbed_attention (default: 3)"),
    "classifier_scale": flag(type=float, metavar="S", help="of --classifier (default: 0, none); 1 to 10 are usual"),
    "classifier_class": flag(metavar="NAME", help="what --classifier leads to (default: the prompt)"),
    "clip_scale": flag(type=float, metavar="S", help="of --clip-guidance (default: 0, none)"),
    "clip_prompt": flag(metavar="TEXT", help="what --clip-guidance leads to (default: the prompt)"),
    "steps": flag("--ddim-steps", type=int, metavar="N", help="sampling steps; default: the model's"),
    "sampler": flag(metavar="NAME", help="`help` lists them; default: the model's"),
    "spacing": flag(metavar="NAME", help="of its times; `help` lists them; default: the model's"),
    "eta": flag(type=float, help="of ddim: noise drawn anew at each step, 0 to 1"),
    "churn": flag(type=float, metavar="S", help="of heun: noise added and taken away, over all steps; 40 is usual"),
    "variance": flag(metavar="NAME", help="of ddpm: small, large, or learned by the model (default: small)"),
    "corrections": flag(type=int, metavar="N", help="of langevin, predictor_corrector: Langevin steps at each level"),
    "tolerance": flag(type=float, metavar="E", help="of ode: largest error of a step (default: 0.001)"),
    "shift": flag(type=float, metavar="S", help="of a rectified flow's times, 3 is usual for large pictures"),
    "reuse": flag(type=int, metavar="N", help="faster, not exact: compute inner layers at every Nth call (default: 1)"),
    "height": flag("-H", type=int, metavar="PIXELS", help="default: as trained"),
    "width": flag("-W", type=int, metavar="PIXELS", help="default: as trained"),
    "window": flag(type=int, metavar="N", help="for large pictures: the UNet takes N x N latents at once, then fuses"),
    "overlap": flag(type=int, metavar="N", help="latents that neighboring windows share (default: half of a window)"),
}
GIVEN: dict[str, Flag] = {  # likewise: what a picture is made of besides prompts
    "image": flag(metavar="FILE", help="to be changed, completed, enlarged or imitated"),
    "mask": flag(metavar="FILE", help="of the image: what is white is painted"),
    "map": flag(metavar="FILE", help="a number for each pixel, for models that read one: a class, a depth"),
    "strength": flag(
        type=float, metavar="S", help="how much of the image goes: of the steps, this share is walked; 1: all"
    ),
    "resample": flag(type=int, metavar="N", help="with a mask: walk each part of the way N times; 5 to 10 are usual"),
    "feather": flag(type=int, metavar="PIXELS", help="around the mask, where the new fades into the old (default: 0)"),
    "back_projection": flag(
        type=int, metavar="N", help="rounds that make a picture shrink to its image (default: the model's, 3 or 0)"
    ),
    "noise_level": flag(type=float, metavar="L", help="added to the image, for models that enlarge so; 0 to 1"),
}
MODEL: dict[str, Flag] = {  # fields of `stipple.commands.drawing.open_model.Opening`
    "checkpoint": flag(metavar="PATH", help=f"model folder, or .ckpt or .safetensors file (default: {CHECKPOINT})"),
    "config_yaml": flag("--yaml", metavar="FILE", help="CompVis' YAML of a checkpoint that is a file"),
    "tokenizer": flag(metavar="FOLDER", help="of a checkpoint that is a file; default: the one its kind is known for"),
    "prediction": flag(metavar="NAME", help="of a checkpoint that is a file: what it outputs: noise, velocity, clean"),
    "variant": flag(metavar="NAME", help="of a checkpoint that is a folder: which of its weights, such as fp16"),
    "guidance_model": flag(metavar="PATH", help="of autoguidance: a weaker version of the checkpoint"),
    "prior": flag(metavar="PATH", help="of a decoder of image embeddings: the model that makes them of prompts"),
    "classifier": flag(metavar="PATH", help="leads to a class: what stipple train-classifier has written"),
    "clip_guidance": flag(metavar="NAME", help="leads to the prompt: a CLIP of open_clip, or a folder with one"),
    "clip_pretrained": flag(metavar="TAG", help="of --clip-guidance: its weights, a tag of open_clip or a file"),
    "lora": flag(action="append", metavar="PATH:WEIGHT", help="low-rank additions; 1: as trained, 0: none; repeatable"),
    "embedding": flag(action="append", metavar="PATH", help="a word that the model has learned; repeatable"),
    "precision": flag(choices=["auto", *DTYPES], help="auto: fp16 on CUDA, else fp32"),
    "device": flag(default="auto", help="auto, cpu, cuda, cuda:1, mps"),
    "decode_memory": flag(type=float, metavar="GIB", help="what would take more is decoded in tiles (default: 2)"),
    "keep_transforms": flag(action="store_true", help="on a CPU: more speed for 4 times the convolutions' memory"),
}
RUN: dict[str, Flag] = {  # what is read, how many pictures there are, and where they go
    "prompt": flag(action="append", default=[], help="a prompt, as a flag"),
    "from_file": flag(metavar="FILE", help="one prompt per line, or a JSON object with its own settings"),
    "like": flag(metavar="FILE.png", help="make a picture again, the same to the last byte; other flags change it"),
    "num_images": flag("-n", type=int, metavar="N", help="pictures per prompt (default: 1)"),
    "batch_size": flag(type=int, metavar="N", help="pictures computed together (default: 1 on a CPU, else 4)"),
    "seed": flag(type=int, help=f"of the first picture, picture i has seed + i; -1: random (default: {SEED})"),
    "outdir": flag(default="outputs", metavar="FOLDER", help="pictures are numbered in it, never overwritten"),
    "grid": flag(action="store_true", help="also write all pictures as one"),
    "preview_every": flag(type=int, metavar="N", help="show the running estimate in a PNG every N steps"),
    "no_metadata": flag(action="store_true", help="do not write into PNG files how they were made"),
}
