"""The latent cache: it is complete or rejected, and training from it equals training from images."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from stipple_core.data.dataset import ImageDataset
from stipple_core.data.loader import make_loader
from stipple_core.data.order import Order
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.sources.scan import scan
from stipple_core.latent_cache.arrays import map_array, map_ragged, pack, save_ragged
from stipple_core.latent_cache.reader import CachedLatents, DamagedCache, cached_collate
from stipple_core.latent_cache.writer import LatentCacheWriter

PICTURES = Path(__file__).parents[2] / "tests" / "pictures"
KEY = {"autoencoder": "abc", "image_size": 16, "templates": ("{text}", "{keywords}"), "flip": True}
OPTIONS = DataConfig(
    folder=str(PICTURES),
    image_size=16,
    captions=["{text}", "{keywords}"],
    validation=0.0,
    flip=True,
    max_bad_fraction=0.5,
)
RECORDS = scan(OPTIONS).train


def moments_of(index: int, flips: bool = True) -> torch.Tensor:
    """[1 or 2, 2c, h, w]: the image itself is used as its moments, so that cache and images can be compared."""
    dataset = ImageDataset(RECORDS, OPTIONS)
    image = dataset.picture(index)
    return torch.stack([image, image.flip(-1)] if flips else [image])


def context_of(caption: str) -> torch.Tensor:
    """[l, d], with one token for each word of the caption."""
    return torch.tensor([[len(word), ord(word[0]) / 8, 0.5] for word in caption.split()])


def fill(writer: LatentCacheWriter, unusable: tuple[int, ...] = (), flips: bool = True) -> list[range]:
    made = []
    for part in writer.missing("moments"):
        writer.add_moments(part, [None if i in unusable else moments_of(i, flips) for i in part])
        made.append(part)
    for part in writer.missing("contexts"):
        writer.add_contexts(part, [context_of(writer.captions[number]) for number in part])
        made.append(part)
    return made


def make_cache(folder, unusable: tuple[int, ...] = (), flips: bool = True, **options) -> str:
    writer = LatentCacheWriter(str(folder), 0, KEY, RECORDS, **{"part_size": 16, **options})
    fill(writer, unusable, flips)
    writer.close(torch.full((2, 3), 0.25))
    return str(folder)


def test_ragged_rows_are_read_back_equal(tmp_path):
    rows = [np.arange(n * 2, dtype=np.float16).reshape(n, 2) for n in (3, 0, 1, 5)]
    save_ragged(str(tmp_path / "x"), pack(rows))
    mapped = map_ragged(str(tmp_path / "x"))
    assert len(mapped) == 4 and all((mapped[i] == row).all() for i, row in enumerate(rows))
    assert not mapped.values.flags.writeable


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2.0**-11)])
def test_moments_and_contexts_are_read_back(tmp_path, dtype, error):
    cache = CachedLatents(make_cache(tmp_path, dtype=dtype), KEY)
    assert len(cache) == 42 and cache.flips and cache.channels == 3
    for index in range(42):
        for flip in (False, True):
            assert (cache.moments(index, flip) - moments_of(index)[int(flip)]).abs().max() <= error
        for numbers, texts in zip(cache.captions_of(index), RECORDS[index].captions, strict=True):
            assert tuple(cache.caption(number) for number in numbers) == texts
            for number, text in zip(numbers, texts, strict=True):
                assert torch.equal(cache.context(number).float(), context_of(text))
    assert torch.equal(cache.null_tokens, torch.full((2, 3), 0.25))


@pytest.mark.parametrize("flips", [True, False])
def test_batches_from_the_cache_equal_batches_from_images(tmp_path, flips):
    options = DataConfig(**{**vars(OPTIONS), "flip": flips})
    images = ImageDataset(RECORDS, options, seed=7)
    cache = CachedLatents(make_cache(tmp_path, flips=flips), KEY, seed=7)
    order = Order(42, 16, 8, seed=7, steps=12)
    for batch, cached in zip(
        make_loader(images, order), make_loader(cache, order, collate=cached_collate), strict=True
    ):
        assert torch.equal(batch.images, cached.moments)
        assert batch.captions == cached.captions and torch.equal(batch.indices, cached.indices)


@pytest.mark.parametrize("unusable", [(3, 17), tuple(range(16)), (41,)])
def test_unusable_records_are_omitted_as_if_they_were_not_in_the_data(tmp_path, unusable):
    good = [record for index, record in enumerate(RECORDS) if index not in unusable]
    images = ImageDataset(good, OPTIONS, seed=7)
    cache = CachedLatents(make_cache(tmp_path / "cache", unusable), KEY, seed=7)
    assert len(cache) == len(good) and [RECORDS[number] for number in cache.usable] == good
    for address in [(epoch, index) for epoch in range(3) for index in range(len(good))]:
        assert torch.equal(images[address].image, cache[address].moments)
        assert images[address].caption == cache[address].caption


def test_moments_of_several_sizes_are_read_back(tmp_path):
    sizes = [(4 + index % 3, 8 - index % 5) for index in range(len(RECORDS))]
    moments = [torch.randn(2, 6, *size) for size in sizes]
    writer = LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, part_size=16, contexts=False)
    for part in writer.missing("moments"):
        writer.add_moments(part, [moments[index] for index in part])
    writer.close(None)
    cache = CachedLatents(str(tmp_path), KEY)
    assert cache.sizes.tolist() == [list(size) for size in sizes]
    for index, each in enumerate(moments):
        assert torch.equal(torch.stack([cache.moments(index), cache.moments(index, flip=True)]), each)


def test_a_cache_without_contexts_has_captions(tmp_path):
    writer = LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, part_size=16, contexts=False)
    assert writer.missing("contexts") == []
    fill(writer)
    writer.close(None)
    cache = CachedLatents(str(tmp_path), KEY)
    assert not list(tmp_path.glob("contexts*")) and cache.null_tokens is None
    batch = cached_collate([cache[0, index] for index in range(4)])
    assert batch.tokens is None and batch.mask is None
    images = ImageDataset(RECORDS, OPTIONS)
    assert batch.captions == [images[0, index].caption for index in range(4)]


@pytest.mark.parametrize("name", ["moments-00000016.npy", "contexts-00000000.npy", "contexts-00000000.starts.npy"])
def test_only_a_part_with_a_flipped_bit_is_written_again(tmp_path, name):
    folder = make_cache(tmp_path)
    whole = (tmp_path / name).read_bytes()
    damaged = bytearray(whole)
    damaged[-7] ^= 4
    (tmp_path / name).write_bytes(damaged)
    writer = LatentCacheWriter(folder, 0, KEY, RECORDS, part_size=16)
    assert [part.start for part in fill(writer)] == [int(name.split("-")[1][:8])]
    assert (tmp_path / name).read_bytes() == whole


@pytest.mark.parametrize("name", ["moments-00000016.npy", "contexts-00000000.npy"])
def test_a_flipped_bit_is_detected_when_its_row_is_read(tmp_path, name):
    folder = make_cache(tmp_path)
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[-3] ^= 4  # in the last row
    (tmp_path / name).write_bytes(damaged)
    cache, part = CachedLatents(folder), range(16, 32)
    read = {"moments": lambda row: cache.moments(row, flip=True), "contexts": cache.context}[name.split("-")[0]]
    last = part[-1] if "moments" in name else 15
    read(last - 1)
    with pytest.raises(DamagedCache, match=f"{name} is damaged at row 15; run stipple cache again"):
        read(last)


@pytest.mark.parametrize("text", ["", "{", '{"stop": 32}', '{"sha256": null}', "[" * 5000])
def test_a_part_with_a_damaged_marker_is_written_again(tmp_path, text):
    folder = make_cache(tmp_path)
    (tmp_path / "moments-00000016.json").write_text(text)
    assert [part.start for part in fill(LatentCacheWriter(folder, 0, KEY, RECORDS, part_size=16))] == [16]


def test_batches_are_padded_and_masked(tmp_path):
    cache = CachedLatents(make_cache(tmp_path), KEY)
    samples = [cache[0, index] for index in range(12)]
    batch = cached_collate(samples)
    lengths = [len(sample.caption.split()) for sample in samples]
    assert batch.mask.sum(1).tolist() == lengths and batch.tokens.shape == (12, max(lengths), 3)
    assert batch.tokens.dtype == torch.float32 and batch.moments.shape == (12, 3, 16, 16)
    assert (batch.tokens[~batch.mask] == 0).all()
    for row, sample in enumerate(samples):
        assert torch.equal(batch.tokens[row, : lengths[row]], context_of(sample.caption))


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_write_equal_files(tmp_path, world):
    alone, shared = make_cache(tmp_path / "alone"), tmp_path / "shared"
    writers = [LatentCacheWriter(str(shared), rank, KEY, RECORDS, world=world, part_size=16) for rank in range(world)]
    parts = [part for writer in writers for part in fill(writer)]
    assert len(parts) == -(-42 // 16) + -(-len(writers[0].captions) // 16)
    for writer in reversed(writers):
        writer.close(torch.full((2, 3), 0.25))
    files = sorted(os.listdir(alone))
    assert sorted(os.listdir(shared)) == files
    assert all((shared / name).read_bytes() == (tmp_path / "alone" / name).read_bytes() for name in files)


def test_an_interrupted_cache_is_continued_with_the_missing_parts(tmp_path):
    writer = LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, part_size=16)
    first, *rest = writer.missing("moments")
    writer.add_moments(first, torch.zeros(16, 2, 3, 16, 16))
    (tmp_path / "moments-00000016.npy").write_bytes(b"half a file, without its marker")
    (tmp_path / "moments-00000016.npy.tmp-1").write_bytes(b"left by a killed process")
    resumed = LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, world=1, part_size=16)
    assert resumed.missing("moments") == rest
    fill(resumed)
    resumed.close(torch.zeros(1, 3))
    cache = CachedLatents(str(tmp_path), KEY)
    assert (cache.moments(3) == 0).all() and torch.equal(cache.moments(20), moments_of(20)[0])
    assert not list(tmp_path.glob("*.tmp-*"))
    assert fill(LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, part_size=16)) == []


def test_an_incomplete_cache_is_an_error(tmp_path):
    writer = LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, world=2, part_size=16)
    fill(writer)
    with pytest.raises(ValueError, match="lacks moments 16 to 31"):
        writer.close(torch.zeros(1, 3))
    with pytest.raises(FileNotFoundError, match="not a complete latent cache"):
        CachedLatents(str(tmp_path), KEY)


def test_a_cache_with_another_key_is_an_error_that_names_the_changes(tmp_path):
    folder = make_cache(tmp_path)
    for change, message in [
        ({"autoencoder": "xyz"}, "autoencoder was 'abc', is 'xyz'"),
        ({"new": 1}, "new was None, is 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            CachedLatents(folder, {**KEY, **change})
        with pytest.raises(ValueError, match=message):
            LatentCacheWriter(folder, 0, {**KEY, **change}, RECORDS, part_size=16)
    with pytest.raises(ValueError, match="flip was True, is None"):
        CachedLatents(folder, {name: value for name, value in KEY.items() if name != "flip"})
    with pytest.raises(ValueError, match="part_size was 16, is 1024"):
        LatentCacheWriter(folder, 0, KEY, RECORDS)
    with pytest.raises(ValueError, match="pictures was"):
        LatentCacheWriter(folder, 0, KEY, RECORDS[1:], part_size=16)
    with pytest.raises(
        ValueError, match="other data or settings: captions was '[0-9a-f]+', is '[0-9a-f]+'; make a new one"
    ):
        others = [dataclasses.replace(record, captions=(("x",),)) for record in RECORDS]
        LatentCacheWriter(folder, 0, KEY, others, part_size=16)
    with pytest.raises(ValueError, match="other data or settings: pictures was"):
        CachedLatents(folder, {**KEY, "pictures": "of another folder"})
    assert len(CachedLatents(folder)) == 42


def test_truncated_parts_are_an_error_that_names_the_file(tmp_path):
    folder = make_cache(tmp_path)
    part = tmp_path / "moments-00000016.npy"
    np.save(tmp_path / "shorter.npy", np.load(part)[:-1])
    for data in (part.read_bytes()[:5000], (tmp_path / "shorter.npy").read_bytes()):
        part.write_bytes(data)
        with pytest.raises(ValueError, match="moments-00000016.npy is damaged"):
            CachedLatents(folder)


def test_pickles_are_never_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        map_array(str(tmp_path / "x.npy"))


def test_values_that_are_not_finite_are_not_written(tmp_path):
    writer = LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, dtype="float16", part_size=16)
    part = writer.missing("moments")[0]
    for value in (float("nan"), 1e6):  # 1e6 is infinite in float16
        moments = torch.zeros(16, 2, 3, 4, 4)
        moments[5, 1, 2, 3, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            writer.add_moments(part, moments)
        assert writer.missing("moments")[0] == part
    with pytest.raises(ValueError, match="16 rows, not 15"):
        writer.add_moments(part, torch.zeros(15, 2, 3, 4, 4))
    with pytest.raises(ValueError, match="'int8'"):
        LatentCacheWriter(str(tmp_path / "x"), 0, KEY, RECORDS, dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_point_posteriors_are_stored_and_means_of_minus_infinity_are_an_error(dtype, tmp_path):
    writer = LatentCacheWriter(str(tmp_path), 0, KEY, RECORDS, dtype=dtype)
    part = writer.missing("moments")[0]
    moments = torch.zeros(len(part), 1, 4, 2, 2)
    moments[:, :, 2:] = -torch.inf  # the log-variances
    writer.add_moments(part, moments)
    stored = map_array(os.path.join(tmp_path, "moments-00000000.npy")).reshape(-1, 1, 4, 2, 2)
    assert np.isneginf(stored[:, :, 2:]).all() and (stored[:, :, :2] == 0).all()
    for place, value in ((0, -torch.inf), (3, torch.inf), (3, torch.nan)):
        wrong = moments.clone()
        wrong[0, 0, place] = value
        with pytest.raises(ValueError, match="not finite"):
            writer.add_moments(part, wrong)


def test_opening_maps_the_files_and_pickling_does_not_copy_them(tmp_path):
    cache = CachedLatents(make_cache(tmp_path), KEY, seed=3)
    assert all(isinstance(part.base, np.memmap) for part in cache._moments)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[4, 5].moments, cache[4, 5].moments)


def test_workers_load_equal_batches(tmp_path):
    cache = CachedLatents(make_cache(tmp_path), KEY, seed=3)
    order = Order(42, 8, 8, seed=3, steps=4)
    alone = list(make_loader(cache, order, collate=cached_collate))
    for a, b in zip(alone, make_loader(cache, order, workers=2, collate=cached_collate), strict=True):
        assert torch.equal(a.moments, b.moments) and torch.equal(a.tokens, b.tokens) and a.captions == b.captions


def test_the_index_counts_records_and_captions(tmp_path):
    make_cache(tmp_path, unusable=(3, 40))
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {"format": 2, "records": 42, "captions": 103, "contexts": True, "flips": 2, "channels": 3}
    assert np.flatnonzero(np.load(tmp_path / "sizes.npy")[:, 0] == 0).tolist() == [3, 40]


def test_json_files_of_a_cache_have_the_format_of_earlier_versions(tmp_path):
    """One space of indentation, entries in the order in which they were computed, no newline at the end."""
    make_cache(tmp_path)
    orders = {
        "key.json": ["pictures", "captions", *KEY, "moments_dtype", "part_size"],
        "index.json": ["format", "records", "captions", "contexts", "flips", "channels"],
        "moments-00000016.json": ["stop", "sha256", "flips", "channels", "sizes", "row_sums"],
        "contexts-00000000.json": ["stop", "sha256", "row_sums"],
    }
    for name, order in orders.items():
        text = (tmp_path / name).read_text()
        assert text == json.dumps(json.loads(text), indent=1) and list(json.loads(text)) == order
