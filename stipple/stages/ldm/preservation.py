"""Pictures of a class, which keep a model from forgetting it while it learns one thing of it (Ruiz et al. 2022).

DreamBooth's prior preservation: the model draws the class before it learns; these pictures are learned beside the new
ones, half of all that is seen, their losses weighted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.pipeline import TextToImage
from stipple.training.distributed.collective import on_main
from stipple.training.trainer import Trainer
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, RecordList, Records
from stipple_core.data.sources.folder import is_image_name
from stipple_core.data.sources.scan import scan
from stipple_core.images.drawn_pictures import encode_png, replace_file

if TYPE_CHECKING:
    from stipple.stages.ldm.ldm_run import LdmRunConfig


@dataclass(frozen=True, kw_only=True)
class PreservationConfig:
    """Pictures that the model makes of a class before it learns, to be learned beside the data."""

    folder: str  # of the pictures; as many as are missing are drawn into it first
    prompt: str  # of the class, such as "a dog": what is drawn, and the caption of all of them
    images: int = 100  # how many there are to be; the paper has 200 for each new picture
    weight: float = 1.0  # of their losses, lambda in eq. 2

    def __post_init__(self):
        if self.images < 1 or not self.weight > 0:
            told = f"images {self.images} must be at least 1 and weight {self.weight} above 0"
            raise ValueError(f"preservation: {told}; 100 and 1 are usual")


def with_class(found: Records, config: LdmRunConfig, trainer: Trainer, check: Callable[[Records], None]) -> Records:
    """The pictures of a run, and as many of the class where its config asks for them; missing ones are drawn.

    The shorter list is repeated, so that an epoch holds both equally often.

    Args:
        check: raises ValueError for a run of these pictures that can't be, which is to be known before any is drawn.

    Raises:
        ValueError: there is no model to draw with, or a cache, which holds none of them.
    """
    kept = config.preservation
    if kept is None:
        return found
    if config.init_from is None or config.cache is not None:
        wrong = "cache" if config.cache is not None else "no init_from"
        raise ValueError(f"preservation goes with init_from, the model that draws it, and cache=null; there is {wrong}")
    on_main(lambda: draw_missing(config, kept, trainer, lambda: check(found)), trainer.is_main)
    drawn = list(_weighted(scan(_data(config.data, kept)).train, kept))
    size = max(len(found.train), len(drawn))
    both = itertools.chain(_repeated(found.train, size), _repeated(drawn, size))
    return Records(RecordList(both), found.validation, found.skipped)


def draw_missing(config: LdmRunConfig, kept: PreservationConfig, trainer: Trainer, check: Callable[[], None]) -> None:
    """Draw the class until there are enough pictures; picture i has seed i, whenever it is drawn."""
    folder = Path(kept.folder)
    there = {path.name for path in folder.rglob("*") if is_image_name(path.name)} if folder.is_dir() else set()
    given = sum(not name.startswith("prior-") for name in there)
    places = [(seed, folder / f"prior-{seed:05d}.png") for seed in range(kept.images - given)]
    places = [(seed, path) for seed, path in places if path.name not in there]
    if not places:
        return
    check()
    trainer.print(f"drawing {len(places)} pictures of {kept.prompt!r} into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    model, samples = TextToImage.load(config.init_from, trainer.device), config.samples
    settings = {"sampler": samples.sampler, "steps": samples.steps, "guidance_scale": samples.guidance_scale}
    for seed, path in places:
        replace_file(encode_png(model(kept.prompt, seed=seed, **settings)[0], {}), path)


def _data(data: DataConfig, kept: PreservationConfig) -> DataConfig:
    """Where the class is read."""
    sources = {"folder": kept.folder, "shards": [], "dataset": None, "where": {}}
    prompt = kept.prompt.replace("{", "{{").replace("}", "}}")
    return dataclasses.replace(data, **sources, captions=[prompt], validation=0.0)


def _weighted(records: Sequence[Record], kept: PreservationConfig) -> Iterator[Record]:
    """Records of the class, named after its folder."""
    for record in records:
        name = f"{Path(kept.folder).name}/{record.name}"
        yield dataclasses.replace(record, name=name, weight=kept.weight)


def _repeated(records: Sequence[Record], size: int) -> Iterator[Record]:
    return itertools.islice(itertools.cycle(records), size)
