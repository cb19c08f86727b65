"""The data and the model of a stage-2 run, checked and built before its first step."""

from __future__ import annotations

from ldm.formats.model_parts import ModelParts
from ldm.pipeline import TextToImage
from stipple.stages.data.data_check import DataCheck
from stipple.stages.ldm.build_model import build_model
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple.stages.ldm.preservation import with_class, with_class_captions
from stipple.stages.ldm.trainable import Trainable
from stipple.training.trainer import Trainer
from stipple_core.data.sources.scan import scan


def prepare_run(
    config: LdmRunConfig, init: ModelParts | None, trainable: Trainable, trainer: Trainer
) -> tuple[TextToImage, DataCheck]:
    """Check the data, build the model, and let gradients reach only what is trained.

    Class images are drawn after the model was built, so that an invalid config is reported before they take long.

    Raises:
        ValueError: the data can't be used, or data, model and config do not fit together.
        OSError: files can't be read or written.
    """
    records = scan(config.data)
    if config.preservation is not None:
        model = build_model(config, init, with_class_captions(records, config.preservation), trainer.device)
        trainable.prepare(model, records.train, config.seed)
        records = with_class(records, config, trainer, init)
    data_check = DataCheck.of(records, config.data, trainer, cached=config.cache is not None)
    if config.preservation is None:
        model = build_model(config, init, data_check.records, trainer.device)
        trainable.prepare(model, data_check.records.train, config.seed)
    return model, data_check
