"""All sources (folder, tar, parquet and dataset) give the same batches, for any number of processes and workers."""

from __future__ import annotations

import dataclasses
import json
import pickle
import tracemalloc

import pytest
import torch
from torch.utils.data import DataLoader

from stipple_core.config import load_config
from stipple_core.data.dataset import ImageDataset, collate
from stipple_core.data.loader import make_loader
from stipple_core.data.order import Order
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, RecordList, fingerprint
from stipple_core.data.sources.scan import scan
from tests.helpers.data.data_sources import make_tar, png_image

COUNT = 37
SOURCES = ("folder", "tar", "parquet", "dataset", "pipe")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, DataConfig]:
    """Configs of the same images and rows in each kind of source, with two shards or parquet files."""
    place = tmp_path_factory.mktemp("sources")
    rows = [{"text": f"t{i}", "words": [f"{i}a", f"{i}b"]} for i in range(COUNT)]
    (place / "folder").mkdir()
    for i in range(COUNT):
        (place / "folder" / f"{i:03d}.png").write_bytes(png_image(i))
    lines = [json.dumps({"file_name": f"{i:03d}.png", **row}) for i, row in enumerate(rows)]
    (place / "folder" / "metadata.jsonl").write_text("\n".join(lines))
    for shard, part in enumerate((range(20), range(20, COUNT))):
        members = [(f"{i:03d}.png", png_image(i)) for i in reversed(part)]
        members += [(f"{i:03d}.json", json.dumps(rows[i]).encode()) for i in part]
        (place / f"{shard}.tar").write_bytes(make_tar(members))
    places = {
        "folder": {"folder": str(place / "folder")},
        "tar": {"shards": str(place / "{0..1}.tar")},
        "pipe": {"shards": f"pipe:cat {place}/{{0..1}}.tar"},
    }
    try:
        import datasets
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        pass
    else:
        table = [{"picture": png_image(i), **row} for i, row in enumerate(rows)]
        for file, part in enumerate((table[:20], table[20:])):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), place / f"{file}.parquet")
        datasets.Dataset.from_list(table).save_to_disk(str(place / "saved"))
        places |= {"parquet": {"shards": str(place / "*.parquet")}, "dataset": {"dataset": str(place / "saved")}}
    options = {"image_size": 8, "validation": 0.0, "captions": ["{text}", "{words}"], "flip": True, "crop": "random"}
    return {kind: DataConfig(**options, **where, index=str(place / "index")) for kind, where in places.items()}


def stream(config: DataConfig, world: int, workers: int, start: int = 0) -> tuple[torch.Tensor, list[str], list[int]]:
    """Images, captions and indices of steps `start` to 8 with batches of 12, of all processes together."""
    records = scan(config).train
    batches = []
    for rank in range(world):
        order = Order(len(records), 12, 12 // world, rank, world, seed=5, start_step=start, steps=8)
        batches.append(list(make_loader(ImageDataset(records, config, seed=5), order, workers)))
    turns = [batch for turn in zip(*batches, strict=True) for batch in turn]
    images = torch.cat([batch.images for batch in turns])
    return images, [text for batch in turns for text in batch.captions], torch.cat([b.indices for b in turns]).tolist()


@pytest.mark.parametrize("kind", SOURCES)
def test_all_sources_and_numbers_of_processes_give_the_same_batches_from_any_step(sources, kind):
    if kind not in sources:
        pytest.skip("needs the extra datasets")
    images, captions, indices = stream(sources["folder"], 1, 0)
    for world, workers, start in ((1, 0, 0), (2, 0, 3), (4, 0, 7), (2, 2, 5), (1, 2, 1)):
        again = stream(sources[kind], world, workers, start)
        assert torch.equal(again[0], images[12 * start :]), (world, workers, start)
        assert again[1:] == (captions[12 * start :], indices[12 * start :])
    assert sorted(indices[:COUNT]) == list(range(COUNT))


def test_spawned_workers_open_shards_themselves(sources):
    config = sources["tar"]
    records = scan(config).train
    dataset, order = ImageDataset(records, config, seed=5), Order(len(records), 12, 12, seed=5, steps=2)
    loader = DataLoader(
        dataset, batch_sampler=order, num_workers=1, collate_fn=collate, multiprocessing_context="spawn"
    )
    images = torch.cat([batch.images for batch in loader])
    assert torch.equal(images, stream(config, 1, 0)[0][:24])


def test_a_larger_validation_split_contains_the_smaller_one(sources):
    for kind, config in sources.items():
        few = {r.name for r in scan(dataclasses.replace(config, validation=0.2)).validation}
        more = {r.name for r in scan(dataclasses.replace(config, validation=0.4)).validation}
        assert few and few < more, kind


def test_exactly_one_source_must_be_set():
    with pytest.raises(ValueError, match=r"data.folder and data.shards are both set; .*data.folder=null"):
        DataConfig(folder="x", shards=["y"])
    with pytest.raises(ValueError, match="data.folder has no value; .* or use data.shards or data.dataset"):
        DataConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A config with a data section."""

    data: DataConfig


def test_overrides_reproduce_the_data_source():
    for options in (
        {"folder": "a b"},
        {"shards": "x/{00..10}.tar", "index": "elsewhere"},
        {"shards": ["pipe:curl -s 'https://x/{0..9}.tar'", "y.tar"]},
        {"dataset": "a/b:c", "split": "test", "image_column": "img"},
    ):
        config = DataConfig(**options)
        assert load_config(Run, None, config.overrides).data == config


def test_a_record_list_equals_the_list_of_its_records(sources):
    plain = [
        Record("/data/a/b.png", "a/b.png", (("x", "y"), ("ü\U0001f34b",)), 3),
        Record("/elsewhere", "c.png", ((),), 2**40),
        Record("d.png", "d.png", (("\ud800",),), 0),
        *list(scan(sources["tar"]).train),
    ]
    packed = RecordList(plain)
    assert list(packed) == plain and len(packed) == len(plain)
    assert packed[-1] == plain[-1] and packed[1:4] == plain[1:4] and packed[0] == plain[0]
    assert list(pickle.loads(pickle.dumps(packed))) == plain
    assert fingerprint(packed) == fingerprint(plain)
    with pytest.raises(IndexError):
        packed[len(plain)]


def test_a_million_records_take_a_fraction_of_a_gigabyte():
    count = 20_000
    tracemalloc.start()
    packed = RecordList(
        Record(f"/data/{i:07d}.jpg", f"{i:07d}.jpg", ((f"a caption of some forty letters, number {i}",),), i)
        for i in range(count)
    )
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(packed) == count and size / count < 180  # bytes; a list of Records takes 600
