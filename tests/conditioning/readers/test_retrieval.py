"""Tests of retrieval: exact neighbors, which exclude the image itself, and zeros for dropped members."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conditioning.interface.inputs import ConditionInputs
from conditioning.readers import retrieval
from conditioning.readers.retrieval import RetrievalConfig, RetrievalReader, nearest, open_database
from stipple_core.embedders import EmbedderConfig
from stipple_core.files.weights import write_weights
from tests.helpers.models.small_encoders import save_open_clip


def points(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=-1) * 4


@pytest.mark.parametrize("rows", [3, 7, 50, 1000])
def test_neighbors_do_not_depend_on_the_rows_per_matrix_product(monkeypatch, rows):
    monkeypatch.setattr(retrieval, "ROWS", rows)
    query, database = points(5, 0), points(50, 1)
    cosine = F.cosine_similarity(query[:, None], database[None], dim=-1)
    assert torch.equal(nearest(query, database, 4), cosine.topk(4).indices)


def test_an_image_is_not_its_own_neighbor(monkeypatch):
    monkeypatch.setattr(retrieval, "ROWS", 6)
    database = points(20, 1)
    rows = nearest(database, database, 3, own=torch.arange(20))
    assert not (rows == torch.arange(20)[:, None]).any()
    assert torch.equal(nearest(database, database, 1)[:, 0], torch.arange(20))


def test_an_image_is_identified_by_its_name_for_any_crop(config):
    """Its embedding differs from that of another crop in the database."""
    folder = Path(config.database).parent / "named"
    folder.mkdir()
    names, database = [f"{i:02}.png" for i in range(30)], points(30, 3)
    write_weights({"embeddings": database}, folder / "embeddings.safetensors")
    (folder / "names.json").write_text(json.dumps(names))
    reader = RetrievalReader(replace(config, database=str(folder / "embeddings.safetensors"), query=False))
    near = F.normalize(database[[4, 9]] + 0.3 * points(2, 8), dim=-1) * 4  # [2, 16], crops of images 4 and 9
    inputs = ConditionInputs(prompts=["", ""], embedding=near, names=["04.png", "elsewhere.png"])
    for same in (inputs, inputs.cat(inputs.null()).select(slice(0, 2)).to("cpu")):
        tokens = reader(same).tokens
        assert not (tokens[0] == database[4]).all(-1).any() and torch.equal(tokens[1, 0], database[9])
    (folder / "names.json").write_text(json.dumps(names[1:]))
    with pytest.raises(ValueError, match="is not a list of the names of 30 images"):
        RetrievalReader(reader.config).open_files()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RetrievalConfig:
    folder = tmp_path_factory.mktemp("retrieval")
    write_weights({"embeddings": points(30, 3)}, folder / "embeddings.safetensors")
    encoder = EmbedderConfig(name=f"local-dir:{save_open_clip(folder)}")
    return RetrievalConfig(encoder=encoder, database=str(folder / "embeddings.safetensors"), neighbors=3, query=True)


def test_prompts_are_the_query_if_there_is_no_image(config):
    reader = RetrievalReader(config)
    prompts, image = ["a circle", "a cat"], torch.zeros(2, 3, 32, 32)
    for inputs, query in (
        (ConditionInputs(prompts=prompts), reader.embedder.texts(prompts)),
        (ConditionInputs(prompts=prompts, image=image), reader.embedder.images(image)),
        (ConditionInputs(prompts=prompts, embedding=points(2, 9)), points(2, 9)),
    ):
        tokens = reader(inputs).tokens
        assert tokens.shape == (2, 4, 16) and torch.equal(tokens[:, 0], query)
        assert torch.equal(tokens[:, 1:], reader.database[nearest(query, reader.database, 3)])


def test_dropped_members_have_zero_tokens(config):
    inputs = ConditionInputs(prompts=["a", "b"], dropped=torch.tensor([True, False]))
    tokens = RetrievalReader(config)(inputs).tokens
    assert not tokens[0].any() and tokens[1].all()


def test_the_database_is_not_stored_in_the_model(config):
    assert not [name for name in RetrievalReader(config).state_dict() if "database" in name]


def test_an_unfit_database_raises(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="stipple embed"):
        open_database("", 16, 3)
    with pytest.raises(ValueError, match="more than 3 of width 8"):
        open_database(config.database, 8, 3)
    with pytest.raises(ValueError, match="more than 30 of width 16"):
        open_database(config.database, 16, 30)
    with pytest.raises(ValueError, match="neighbors 0 must be at least 1"):
        RetrievalConfig(neighbors=0)
