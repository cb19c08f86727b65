"""Prior preservation: class images that keep a model from forgetting a class (DreamBooth, Ruiz et al. 2022).

The model draws images of the class before training. They are half of all training images, and their losses are
weighted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.formats.model_parts import ModelParts
from ldm.pipeline import TextToImage
from ldm.sampling.defaults import default_settings
from stipple.stages.ldm.denoiser_validation import SamplesConfig
from stipple.stages.ldm.ldm_run import LdmRunConfig, PreservationConfig
from stipple.training.distributed.collective import on_main
from stipple.training.trainer import Trainer
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, RecordList, Records
from stipple_core.data.sources.folder import is_image_name
from stipple_core.data.sources.scan import scan
from stipple_core.images.drawn_pictures import encode_png, replace_file
from stipple_core.operators.winograd import lay_out


def with_class_captions(records: Records, config: PreservationConfig) -> Records:
    """Return records with the captions that `with_class` will return, before the class images are drawn."""
    count = max(config.images, len(_images_in(Path(config.folder))))
    placeholder = dataclasses.replace(records.train[0], captions=((config.prompt,),))
    return _joined(records, [placeholder] * count)


def with_class(records: Records, config: LdmRunConfig, trainer: Trainer, init: ModelParts) -> Records:
    """Draw the class images that are missing, and return the records with as many class images as others.

    The shorter list is repeated, so that an epoch has the same number of both.
    """
    preservation = config.preservation
    on_main(lambda: draw_missing(preservation, config.samples, init, trainer), trainer.is_main)
    class_records = scan(_class_data(config.data, preservation)).train
    return _joined(records, list(_weighted(class_records, preservation)))


def draw_missing(config: PreservationConfig, samples: SamplesConfig, init: ModelParts, trainer: Trainer) -> None:
    """Draw class images until there are enough; image i has seed i, whenever it is drawn."""
    folder = Path(config.folder)
    existing = _images_in(folder)
    provided = sum(not name.startswith("prior-") for name in existing)
    paths = [(seed, folder / f"prior-{seed:05d}.png") for seed in range(config.images - provided)]
    paths = [(seed, path) for seed, path in paths if path.name not in existing]
    if not paths:
        return
    trainer.print(f"drawing {len(paths)} images of {config.prompt!r} into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    device = trainer.device
    autoencoder, unet = lay_out(init.autoencoder.to(device)), lay_out(init.unet.to(device))
    model = TextToImage(autoencoder, unet, init.conditioner.to(device), init.scheduling, default_settings(init))
    settings = {"sampler": samples.sampler, "steps": samples.steps, "guidance_scale": samples.guidance_scale}
    for seed, path in paths:
        replace_file(encode_png(model(config.prompt, seed=seed, **settings)[0], {}), path)


def _images_in(folder: Path) -> set[str]:
    """Names of the image files in a folder, which may not exist yet."""
    return {path.name for path in folder.rglob("*") if is_image_name(path.name)} if folder.is_dir() else set()


def _class_data(data: DataConfig, config: PreservationConfig) -> DataConfig:
    """The data config of the class images."""
    sources = {"folder": config.folder, "shards": [], "dataset": None, "where": {}}
    prompt = config.prompt.replace("{", "{{").replace("}", "}}")
    return dataclasses.replace(data, **sources, captions=[prompt], validation=0.0)


def _weighted(records: Sequence[Record], config: PreservationConfig) -> Iterator[Record]:
    """The records of the class images, weighted and named after their folder."""
    for record in records:
        name = f"{Path(config.folder).name}/{record.name}"
        yield dataclasses.replace(record, name=name, weight=config.weight)


def _joined(records: Records, class_records: Sequence[Record]) -> Records:
    """Training records and class records, the shorter list repeated to the length of the longer one."""
    size = max(len(records.train), len(class_records))
    both = itertools.chain(_repeated(records.train, size), _repeated(class_records, size))
    return Records(RecordList(both), records.validation, records.skipped)


def _repeated(records: Sequence[Record], size: int) -> Iterator[Record]:
    return itertools.islice(itertools.cycle(records), size)
