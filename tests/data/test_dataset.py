"""The dataset: a sample depends only on its address, and a file that can't be decoded is replaced."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stipple_core.data.dataset import ImageDataset, TooManyBad, collate
from stipple_core.data.loader import make_loader
from stipple_core.data.order import Order
from stipple_core.data.records.buckets import Buckets
from stipple_core.data.records.rows import maps_fingerprint
from stipple_core.data.sources.scan import scan
from tests.helpers.data.data_sources import folder_config, make_folder

PICTURES = Path(__file__).parents[2] / "tests" / "pictures"


def test_a_sample_depends_only_on_its_address():
    options = folder_config(PICTURES, captions=["{text}", "{keywords}"], flip=True, crop="random")
    records = scan(options).train
    first = {address: ImageDataset(records, options, seed=3)[address] for address in ((0, 5), (1, 5), (9, 0))}
    dataset = ImageDataset(records, options, seed=3)
    torch.rand(7)
    for address in reversed(first):
        sample = dataset[address]
        assert torch.equal(sample.image, first[address].image)
        assert (sample.caption, sample.index) == (first[address].caption, address[1])


def test_flips_and_captions_change_with_the_epoch():
    options = folder_config(PICTURES, captions=["{keywords}", "{text}"], flip=True)
    dataset = ImageDataset(scan(options).train, options)
    samples = [dataset[epoch, 0] for epoch in range(40)]
    straight = dataset.picture(0)
    flipped = sum(not torch.equal(sample.image, straight) for sample in samples)
    assert 8 < flipped < 32
    assert all(torch.equal(s.image, straight) or torch.equal(s.image, straight.flip(-1)) for s in samples)
    assert len({sample.caption for sample in samples}) > 3


def test_undecodable_files_are_replaced_by_the_same_records_and_logged_once(tmp_path):
    names = tuple(f"{number}.png" for number in range(8))
    make_folder(tmp_path, [{"file_name": name, "text": name} for name in names], names)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    (tmp_path / "5.png").write_bytes(b"no image")
    options = folder_config(tmp_path)
    records, log = scan(options).train, tmp_path / "skipped.jsonl"
    dataset = ImageDataset(records, options, on_skip=str(log))
    samples = [dataset[epoch, index] for epoch in range(3) for index in range(8)]
    assert {skip.path for skip in dataset.skipped.values()} == {"3.png", "5.png"}
    assert [sample.index for sample in samples] == list(range(8)) * 3
    assert not {"3.png", "5.png"} & {sample.caption for sample in samples}
    for sample in samples:  # caption and image are of the same record
        assert torch.equal(sample.image, dataset.picture(int(sample.caption[0])))
    again = ImageDataset(records, options, on_skip=str(log))
    assert again[2, 3].caption == dataset[2, 3].caption and again[1, 5].caption == dataset[1, 5].caption
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == ["3.png", "5.png"]


def test_too_many_undecodable_files_are_an_error(tmp_path):
    make_folder(tmp_path, [{"file_name": name, "text": "x"} for name in ("a.png", "b.png", "c.png")])
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    options = folder_config(tmp_path, max_bad_fraction=0.5)
    dataset = ImageDataset(scan(options).train, options)
    with pytest.raises(ValueError, match="2 of 3 images can't be used"):
        for index in range(3):
            dataset[0, index]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_follow_the_order_and_do_not_use_the_global_random_state(workers):
    options = folder_config(PICTURES, captions=["{keywords}", "{text}"], flip=True)
    dataset = ImageDataset(scan(options).train, options, seed=2)
    order = Order(len(dataset), 8, 4, seed=2, steps=3)
    state = torch.get_rng_state()
    batches = list(make_loader(dataset, order, workers))
    assert torch.equal(torch.get_rng_state(), state)
    for batch, addresses in zip(batches, order, strict=True):
        expected = collate([dataset[address] for address in addresses])
        assert torch.equal(batch.images, expected.images) and batch.captions == expected.captions
        assert batch.indices.tolist() == [address.index for address in addresses]


@pytest.mark.parametrize("buckets", [False, True])
def test_three_epochs_are_equal_for_any_processes_workers_and_resume_point(tmp_path, buckets):
    """24 steps of 12 are three epochs of the 96 records; every fourth micro-batch begins a step."""
    names = tuple(f"{number:02}.png" for number in range(96))
    make_folder(tmp_path, [{"file_name": name, "text": name} for name in names], names)
    options = folder_config(tmp_path, flip=True)
    records = scan(options).train
    shapes = Buckets([(16, 16), (24, 8)], (np.arange(96) % 5 == 0).astype(np.int16)) if buckets else None
    dataset = ImageDataset(records, options, seed=4, buckets=shapes)
    of = None if shapes is None else shapes.of

    def loaded(world: int, workers: int, start: int, steps: int) -> list[tuple]:
        loaders = (
            make_loader(dataset, Order(96, 12, 3, rank, world, 4, start, steps, of), workers) for rank in range(world)
        )
        return [
            (batch.captions, batch.images.sum().item(), tuple(batch.images.shape))
            for turn in zip(*loaders, strict=True)
            for batch in turn
        ]

    whole = loaded(1, 0, 0, 24)
    for number, start in enumerate(range(0, 24, 2)):
        assert loaded((1, 2, 4)[number % 3], 0, start, 24) == whole[4 * start :]
    for world in (1, 2, 4):
        assert loaded(world, 2, 5, 24) == whole[20:]


def test_an_endless_loader_can_be_stopped_at_any_time():
    options = folder_config(PICTURES)
    dataset = ImageDataset(scan(options).train, options)
    loader = iter(make_loader(dataset, Order(len(dataset), 2, 2)))
    assert next(loader).images.shape == (2, 3, 16, 16)


def bad_folder(folder: Path, count: int) -> Path:
    """Captioned files that are not images."""
    names = tuple(f"{number}.png" for number in range(count))
    make_folder(folder, [{"file_name": name, "text": name} for name in names], names)
    for name in names:
        (folder / name).write_bytes(b"no image")
    return folder


def test_bad_files_of_all_workers_are_counted_together(tmp_path):
    options = folder_config(bad_folder(tmp_path, 8), max_bad_fraction=0.5)
    records = scan(options).train
    workers = [ImageDataset(records, options, on_skip=f"{tmp_path}/log", entries=8) for _ in range(8)]
    for number in range(4):
        assert workers[number].picture(number) is None and workers[number + 1].picture(number) is None
    with pytest.raises(TooManyBad, match="5 of 8 images can't be used"):
        workers[7].picture(7)


def test_101_bad_records_in_a_row_are_an_error(tmp_path):
    options = folder_config(bad_folder(tmp_path, 3))
    with pytest.raises(TooManyBad, match="101 records in a row"):
        ImageDataset(scan(options).train, options)[0, 0]


def test_a_system_error_names_the_image_and_skips_nothing(tmp_path, monkeypatch):
    options = folder_config(bad_folder(tmp_path, 1))
    dataset = ImageDataset(scan(options).train, options, on_skip=f"{tmp_path}/log")

    def fail(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("stipple_core.data.dataset.load_image", fail)
    with pytest.raises(OSError, match="Too many open files") as raised:
        dataset.picture(0)
    assert raised.value.filename == f"{tmp_path}/0.png" and not dataset.skipped


def test_the_fingerprint_of_maps_changes_with_their_files(tmp_path):
    folder = make_folder(tmp_path / "data", [{"file_name": f"{name}.png", "text": name} for name in "abc"])
    for name in "abc":
        (tmp_path / "maps").mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "maps" / f"{name}.png")
    records, maps = scan(folder_config(folder)).train, str(tmp_path / "maps")
    before = maps_fingerprint(maps, records)
    assert maps_fingerprint(maps, records) == before
    Image.effect_noise((8, 8), 90).save(tmp_path / "maps" / "b.png")
    assert maps_fingerprint(maps, records) != before
    (tmp_path / "maps" / "b.png").unlink()
    assert maps_fingerprint(maps, records) != before
