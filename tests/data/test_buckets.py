"""Aspect-ratio buckets: their shapes, the assignment of images, and global batches of one shape each."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stipple_core.data.dataset import ImageDataset, collate
from stipple_core.data.loader import make_loader
from stipple_core.data.order import BucketSchedule, Order
from stipple_core.data.records.buckets import BucketConfig, assign, bucket_shapes, check_step
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record
from stipple_core.data.sources.scan import scan
from stipple_core.data.verify import InspectionCache, inspect, read_sizes


@pytest.mark.parametrize(("size", "step", "aspect"), [(256, 64, 2.0), (256, 32, 4.0), (512, 64, 2.0), (32, 8, 3.0)])
def test_shapes_are_multiples_of_the_step_within_area_and_aspect_ratio(size, step, aspect):
    shapes = bucket_shapes(size, BucketConfig(step=step, max_aspect=aspect))
    assert (size, size) in shapes and len(shapes) > 1
    for width, height in shapes:
        assert width % step == height % step == 0 and 0 < width * height <= size**2
        assert max(width, height) <= aspect * min(width, height) and (height, width) in shapes
        assert (min(width, height) + step) * max(width, height) > size**2  # no larger side fits
    assert bucket_shapes(size, BucketConfig(step=step, max_aspect=1.0)) == [(size, size)]


def test_errors_in_shapes_suggest_a_fix():
    with pytest.raises(ValueError, match="data.image_size 100 is not a multiple of data.buckets.step 64; use .*128"):
        DataConfig(folder="x", image_size=100, buckets=BucketConfig())
    with pytest.raises(ValueError, match="data.buckets.step 48 is not a multiple of 64 .here.; use 64"):
        check_step(BucketConfig(step=48), 64, "here")
    for options in ({"step": 0}, {"max_aspect": 0.5}, {"max_aspect": math.nan}, {"max_aspect": math.inf}):
        with pytest.raises(ValueError, match=f"data.buckets.{next(iter(options))}"):
            BucketConfig(**options)


def test_an_image_is_assigned_to_the_nearest_aspect_ratio():
    shapes = bucket_shapes(256, BucketConfig(step=32, max_aspect=3.0))
    sizes = np.random.default_rng(0).integers(1, 3000, (500, 2))
    buckets = assign([tuple(size) for size in sizes], shapes)
    for index, (width, height) in enumerate(sizes.tolist()):
        off = [abs(math.log(width / height) - math.log(w / h)) for w, h in shapes]
        assert off[buckets.of[index]] == pytest.approx(min(off))
    assert [assign([shape], shapes).shape(0) for shape in shapes] == shapes


SIZES = [60, 21, 16, 5, 2, 1]  # records in the buckets: for many batches, for one, and for less than one


def of(sizes=SIZES) -> np.ndarray:
    """The bucket of each record, in a mixed order."""
    return np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))


def stream(buckets, world: int = 1, micro: int = 12, start: int = 0, steps: int = 110) -> list[list]:
    """The global batches of 12 of all processes together."""
    orders = [Order(len(buckets), 12, micro, r, world, 7, start, steps, buckets) for r in range(world)]
    turns = [address for turn in zip(*orders, strict=True) for part in turn for address in part]
    return [turns[i : i + 12] for i in range(0, len(turns), 12)]


def test_every_global_batch_is_of_one_bucket_for_any_processes_and_start():
    buckets = of()
    whole = stream(buckets)
    assert all(len({buckets[address.index] for address in batch}) == 1 for batch in whole)
    assert len({buckets[batch[0].index] for batch in whole}) == len(SIZES)
    for world, micro in ((1, 6), (2, 6), (2, 3), (4, 3), (3, 4)):
        assert stream(buckets, world, micro) == whole
    for start in range(0, 110, 3):
        assert stream(buckets, 2, 3, start, min(start + 3, 110)) == whole[start : start + 3]


def test_all_records_are_used_equally_often():
    buckets = of()
    rounds = 12  # as many as a batch has samples: after them, each bucket has used its records that often
    steps = rounds * sum(SIZES) // 12
    seen = Counter(address for batch in stream(buckets, steps=steps) for address in batch)
    assert set(seen.values()) == {1}  # no address twice
    counts = Counter(address.index for address in seen)
    assert set(counts.values()) == {rounds} and len(counts) == len(buckets)


def test_a_single_bucket_gives_the_order_without_buckets():
    assert stream([0] * 50) == [batch for batch in stream_without(50)] == stream([3] * 50)


def stream_without(size: int) -> list[list]:
    return list(Order(size, 12, 12, seed=7, steps=110))


def test_the_bucket_depends_only_on_seed_and_step():
    steps = np.random.default_rng(0).permutation(300).tolist()
    schedule = BucketSchedule(SIZES, 12, seed=3)
    drawn = {step: schedule(step) for step in steps}
    assert [drawn[step] for step in range(300)] == [BucketSchedule(SIZES, 12, seed=3)(step) for step in range(300)]
    for bucket in range(len(SIZES)):  # the batches of a bucket are consecutive
        assert [n for b, n in (drawn[step] for step in range(300)) if b == bucket] == list(
            range(sum(b == bucket for b, _ in drawn.values()))
        )
    assert [BucketSchedule(SIZES, 12, seed=4)(step) for step in range(300)] != [drawn[step] for step in range(300)]
    assert BucketSchedule([10**6, 3], 12)(10**8)[0] == 0  # computed without a loop over steps


def folder_of(tmp_path: Path, sizes: list[tuple[int, int]]) -> Path:
    for number, (width, height) in enumerate(sizes):
        ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
        Image.fromarray(ramp).save(tmp_path / f"{number:03}.png")
    return tmp_path


def dataset_of(folder: Path, **options) -> ImageDataset:
    config = DataConfig(
        folder=str(folder), image_size=32, validation=0.0, buckets=BucketConfig(step=8, max_aspect=2.0), **options
    )
    records = scan(config, captioned=False).train
    sizes = [(each.width, each.height) for each in inspect(records, InspectionCache(f"{folder}/none"))]
    return ImageDataset(records, config, seed=5, buckets=assign(sizes, bucket_shapes(32, config.buckets)))


def test_images_have_the_shape_of_their_bucket_and_only_the_longer_side_is_cropped(tmp_path):
    dataset = dataset_of(folder_of(tmp_path, [(64, 64), (96, 60), (60, 96), (400, 40), (1, 90)]))
    shapes = [tuple(dataset.picture(index).shape) for index in range(5)]
    assert shapes == [(3, 32, 32), (3, 24, 40), (3, 40, 24), (3, 24, 40), (3, 40, 24)]
    wide = dataset.picture(1)[0, 10]  # 96 x 60 becomes 40 x 24: almost all of the width is used
    assert wide[0] < -0.95 and wide[-1] > 0.95


def test_loaders_give_equal_batches_with_and_without_workers(tmp_path):
    draw = np.random.default_rng(0)
    sizes = [(int(w), int(h)) for w, h in draw.integers(20, 90, (40, 2))]
    dataset = dataset_of(folder_of(tmp_path, sizes), flip=True, crop="random")
    order = Order(40, 6, 3, seed=5, steps=20, buckets=dataset.buckets.of)
    alone, together = (list(make_loader(dataset, order, workers)) for workers in (0, 2))
    assert len({batch.images.shape for batch in alone}) > 2
    for a, b, addresses in zip(alone, together, order, strict=True):
        assert torch.equal(a.images, b.images) and a.indices.tolist() == [address.index for address in addresses]
        assert torch.equal(a.images, collate([dataset[address] for address in reversed(addresses)][::-1]).images)


def test_a_replacement_has_the_shape_of_the_unusable_image(tmp_path):
    dataset = dataset_of(folder_of(tmp_path, [(64, 64)] * 4 + [(96, 60)] * 4))
    wanted = tuple(dataset.picture(6).shape)
    (tmp_path / "006.png").write_bytes(b"damaged")
    assert {tuple(dataset[epoch, 6].image.shape) for epoch in range(8)} == {wanted}
    assert list(dataset.skipped) == [6]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_upright_images(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png", form, exif=exif)
    records = [Record(str(tmp_path / "a.png"), "a.png", (("",),), 1)]
    header, whole = read_sizes(records)[0], inspect(records, InspectionCache(str(tmp_path)))[0]
    assert header == whole and (whole.width > whole.height) == (orientation < 5)
