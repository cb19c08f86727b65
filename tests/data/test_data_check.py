"""The run folder is locked during the data check, and networks stay in training mode after an error."""

from __future__ import annotations

import os

import pytest
from torch import nn

import stipple.stages.data.data_check
from stipple.stages.data.data_check import DataCheck
from stipple.stages.ldm.ldm_training import LdmTraining
from stipple.training.trainer import Trainer
from stipple.training.trainer_config import TrainerConfig
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, RecordList, Records
from stipple_core.data.verify import Inspection


def test_the_run_folder_is_locked_during_the_data_check(tmp_path, monkeypatch):
    run, messages = tmp_path / "run", []
    trainer, other = (Trainer(TrainerConfig(), run, {}) for _ in range(2))
    records = Records(RecordList([Record("a.png", "a.png", (), 1)]), RecordList([]), [])
    config = DataConfig(folder=str(tmp_path))

    def inspect(part, memory, share):
        with pytest.raises(ValueError, match="in use by another run") as refused:
            DataCheck.of(records, config, other)
        messages.append(str(refused.value))
        return [Inspection(8, 8) for _ in part]

    monkeypatch.setattr(stipple.stages.data.data_check, "inspect", inspect)
    DataCheck.of(records, config, trainer)
    assert len(messages) == 2 and os.listdir(tmp_path) == []


def test_networks_stay_in_training_mode_after_an_error_with_their_averages(tmp_path):
    class Broken:
        def whole(self, module: nn.Module, saved: bool) -> nn.Module:
            return module

    unet = nn.Linear(1, 1)
    parts = {"model": None, "network": unet, "text_network": unet, "averages": [], "optimizer": None}
    learner = LdmTraining(trainer=Broken(), modules=[unet], **parts)
    with pytest.raises(AttributeError), learner.averaged():  # there is no model
        pass
    assert unet.training
