"""The order of training: a function of seed and step, for any number of processes."""

from __future__ import annotations

import pytest

from stipple_core.data.order import Address, Order


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (7, 16), (1, 3), (12, 12)])
def test_every_epoch_contains_every_record_once(size, batch):
    order = Order(size, batch, batch, seed=1, steps=size * 3)
    stream = [address for addresses in order for address in addresses]
    for epoch in range(len(stream) // size):
        part = stream[epoch * size : (epoch + 1) * size]
        assert {address.epoch for address in part} == {epoch}
        assert sorted(address.index for address in part) == list(range(size))


def test_global_batches_do_not_depend_on_the_number_of_processes():
    def batches(world: int, micro: int, start: int = 0) -> list[list[Address]]:
        orders = [Order(37, 24, micro, rank, world, seed=5, start_step=start, steps=9) for rank in range(world)]
        streams = [list(order) for order in orders]
        assert all(len(stream) == len(order) for stream, order in zip(streams, orders, strict=True))
        turns = [address for turn in zip(*streams, strict=True) for part in turn for address in part]
        return [turns[i : i + 24] for i in range(0, len(turns), 24)]

    whole = batches(1, 24)
    for world, micro in ((1, 12), (2, 12), (2, 6), (4, 3), (3, 4)):
        assert batches(world, micro) == whole
        assert batches(world, micro, start=4) == whole[4:]


def test_orders_differ_between_epochs_and_seeds():
    def stream(seed):
        return [address.index for addresses in Order(50, 50, 50, seed=seed, steps=2) for address in addresses]

    assert stream(0)[:50] != stream(0)[50:] and stream(0) != stream(1) and stream(0) == stream(0)


def test_the_error_for_an_indivisible_batch_size_suggests_a_fix():
    with pytest.raises(ValueError, match="global batch 10 is not a multiple of micro batch 4 x 2 processes; use 8"):
        Order(100, 10, 4, 0, 2)
    with pytest.raises(ValueError, match="at least 1"):
        Order(0, 4, 4)
    with pytest.raises(TypeError):
        len(Order(4, 4, 4))


def test_an_order_without_buckets_needs_memory_only_for_its_permutation():
    import tracemalloc

    tracemalloc.start()  # counts numpy's arrays, but not torch's permutation
    order = Order(1_000_000, 4, 4)
    order.micro_batch_at(0, 0)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_a_single_bucket_gives_the_order_without_buckets():
    plain, single = (Order(37, 6, 3, seed=2, steps=20, buckets=of) for of in (None, [3] * 37))
    assert list(plain) == list(single)
