"""What a drawing command is asked for: prompts and settings, from its words, from files, from a picture's record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stipple_core.images.drawn_pictures import read_record
from stipple_core.prompt_files import check_settings, read_prompts

SEED = 42


@dataclass(frozen=True, kw_only=True)
class DrawingRequest:
    """What a command line asks for."""

    prompts: Sequence[str]  # one or several
    settings: Mapping[str, Any]  # of all of them: num_images and fields of Settings, those that were given
    default: str | None = None  # the prompt where there is none; None: there has to be one
    example: str = ""  # how the command is called
    from_file: str | None = None  # more prompts, a line each
    like: str | None = None  # a picture that is to be made again
    seed: int | None = None  # of the first picture; -1: random


def read_jobs(request: DrawingRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What to make: arguments of `TextToImage.plan`, one dict per prompt; and the record of a picture, or {}.

    Raises:
        FileNotFoundError, ValueError: in one line, for what is wrong with any model.
    """
    from ldm.sampling.settings import Settings

    known = [field.name for field in fields(Settings)]
    jobs = [{**request.settings, "prompt": prompt} for prompt in request.prompts]
    if request.from_file is not None:
        inside = [name for name in known if name not in ("batch", "place")]
        lines = read_prompts(Path(request.from_file), (*inside, "num_images"))
        jobs += [{**request.settings, **line} for line in lines]
    record = {} if request.like is None else read_record(Path(request.like))
    if record:
        pictures = record["pictures"] if isinstance(record.get("pictures"), list) else [None]
        where = f"the record in {request.like}"
        pictures = [check_settings(picture, (*known, "num_images"), where) for picture in pictures]
        if request.seed is not None:
            pictures = [{k: v for k, v in picture.items() if k != "seed"} for picture in pictures]
        jobs = [picture | job for job in jobs or [dict(request.settings)] for picture in pictures]
    if not jobs:
        if request.default is None or request.from_file is not None:
            raise ValueError(f"there is no prompt; give one, as in: {request.example}")
        jobs = [{**request.settings, "prompt": request.default}]
    return list(number(jobs, SEED if request.seed is None else request.seed)), record


def number(jobs: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Give each job a seed: its own, or else `seed` (-1: random) plus the number of pictures before it.

    Raises:
        ValueError: settings that are wrong with any model, found before one is loaded.
    """
    from ldm.sampling.defaults import with_default_scale
    from ldm.sampling.settings import Settings, random_seed

    seed, count = random_seed() if seed == -1 else seed, 0
    for job in jobs:
        job = {"seed": seed + count, "prompt": ""} | {name: value for name, value in job.items() if value is not None}
        job = with_default_scale(job)
        if job["seed"] == -1:
            job["seed"] = random_seed()
        Settings(**{name: value for name, value in job.items() if name != "num_images"})
        images = job.get("num_images", 1)
        if not isinstance(images, int) or images < 1:
            raise ValueError(f"num_images {images!r} must be a whole number, at least 1")
        count += images
        yield job
