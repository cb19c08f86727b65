"""Test of the four edits that add a reader of a new input, see `conditioning.readers.registry`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from conditioning import ConditionerConfig, ConditionInputs, Context, build_conditioner, load_conditioner
from conditioning.interface.input_reader import InputReader, Widths
from conditioning.readers.registry import READERS


@dataclass(frozen=True, kw_only=True)
class SeasonConfig:
    """Edit 1, first part: the options of the reader."""

    width: int = 4


class SeasonReader(InputReader):
    """Edit 1, second part: the reader. Edit 2 is its row in READERS."""

    reads = frozenset({"season"})
    trainable = True
    Config = SeasonConfig

    def __init__(self, config: SeasonConfig) -> None:
        super().__init__()
        self.config, self.widths = config, Widths(vector=config.width)
        self.table = nn.Embedding(5, config.width)

    def forward(self, inputs: ConditionInputs) -> Context:
        return Context(vector=self.table(torch.where(inputs.is_dropped, 4, inputs.season)))


@dataclass(frozen=True, kw_only=True)
class ConfigWithSeason(ConditionerConfig):
    """Edit 3: a section of ConditionerConfig."""

    season: SeasonConfig | None = None


@dataclass(frozen=True, kw_only=True)
class InputsWithSeason(ConditionInputs):
    """Edit 4: a field of ConditionInputs."""

    season: Tensor | None = None  # [B] 0 to 3


def test_a_reader_of_a_new_input_takes_four_edits(monkeypatch, tmp_path):
    monkeypatch.setitem(READERS, "season", SeasonReader)
    conditioner = build_conditioner(ConfigWithSeason(kind="unconditional", season=SeasonConfig(width=6)), seed=1)
    assert conditioner.vector_dim == 6 and conditioner.trainable
    assert conditioner.reads == conditioner.required_to_sample == {"season"}
    inputs = InputsWithSeason(prompts=["", ""], season=torch.tensor([1, 3]))
    both = inputs.cat(inputs.null()).to("cpu")
    assert both.present == {"season"} and both.select(slice(1, 3)).season.tolist() == [3, 1]
    table = conditioner.readers["season"].table.weight
    assert torch.equal(conditioner.encode([""] * 4, both).vector, table[[1, 3, 4, 4]])
    tokens = conditioner.tokenize([""] * 4)  # as in training, with caption dropout
    assert torch.equal(conditioner(tokens.ids, tokens.mask, inputs).vector, table[[1, 3, 4, 4]])
    with pytest.raises(ValueError, match="requires season besides prompts"):
        conditioner.encode([""])
    conditioner.save(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    loaded = load_conditioner(tmp_path)
    assert (
        loaded.readers["season"].config == SeasonConfig(width=6) and loaded.fingerprint() == conditioner.fingerprint()
    )
    assert torch.equal(loaded.encode(["", ""], inputs).vector, table[[1, 3]])
