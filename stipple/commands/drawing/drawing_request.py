"""What a drawing command has to draw: prompts and settings from its words, from files, and from a picture's record."""

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
    """The prompts and settings of a command line."""

    prompts: Sequence[str]
    settings: Mapping[str, Any]  # those that were specified: num_images, and fields of Settings
    default: str | None = None  # the prompt where there is none; None: a prompt is required
    example: str = ""  # a command line, for error messages
    from_file: str | None = None  # a file with more prompts
    like: str | None = None  # a picture that is drawn again
    seed: int | None = None  # of the first picture; -1: random


def read_jobs(request: DrawingRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what to draw.

    Returns:
        The arguments of `TextToImage.plan`, a dict for each prompt; and the record of the picture that is drawn
        again, or {}.

    Raises:
        FileNotFoundError, ValueError: for a missing or unreadable file, and for settings that no model accepts.
    """
    from ldm.sampling.settings import Settings

    names = [field.name for field in fields(Settings)]
    jobs = [{**request.settings, "prompt": prompt} for prompt in request.prompts]
    if request.from_file is not None:
        allowed = [name for name in names if name not in ("batch", "place")]
        lines = read_prompts(Path(request.from_file), (*allowed, "num_images"))
        jobs += [{**request.settings, **line} for line in lines]
    record = {} if request.like is None else read_record(Path(request.like))
    if record:
        pictures = record["pictures"] if isinstance(record.get("pictures"), list) else [None]
        where = f"the record in {request.like}"
        pictures = [check_settings(picture, (*names, "num_images"), where) for picture in pictures]
        if request.seed is not None:
            pictures = [{k: v for k, v in picture.items() if k != "seed"} for picture in pictures]
        jobs = [picture | job for job in jobs or [dict(request.settings)] for picture in pictures]
    if not jobs:
        if request.default is None or request.from_file is not None:
            raise ValueError(f"there is no prompt; give one, as in: {request.example}")
        jobs = [{**request.settings, "prompt": request.default}]
    return list(with_seeds(jobs, SEED if request.seed is None else request.seed)), record


def with_seeds(jobs: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Yield each job with a seed: its own, or else `seed` (-1: random) plus the number of pictures before it.

    Raises:
        ValueError: for settings that no model accepts; they are found before a model is loaded.
    """
    from ldm.sampling.defaults import with_default_scale
    from ldm.sampling.settings import Settings, check_count, random_seed

    seed, pictures = random_seed() if seed == -1 else seed, 0
    for job in jobs:
        values = {name: value for name, value in job.items() if value is not None}
        job = with_default_scale({"seed": seed + pictures, "prompt": ""} | values)
        if job["seed"] == -1:
            job["seed"] = random_seed()
        Settings(**{name: value for name, value in job.items() if name != "num_images"})
        images = job.get("num_images", 1)
        check_count("num_images", images)
        pictures += images
        yield job
