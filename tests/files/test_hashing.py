"""Hashes of files and weights."""

import hashlib

import torch

from stipple_core.files.hashing import file_sha256, hash_weights, raw_bytes


def digest(weights: dict[str, torch.Tensor], half: bool = False) -> str:
    value = hashlib.sha256()
    hash_weights(value, weights, half)
    return value.hexdigest()


def test_the_hash_of_a_file_is_that_of_its_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_the_hash_of_weights_depends_on_names_shapes_dtypes_and_values_only():
    weights = {"b": torch.randn(2, 3, 4, 4), "a": torch.randn(3)}
    same = {"a": weights["a"].clone(), "b": weights["b"].to(memory_format=torch.channels_last)}
    assert digest(weights) == digest(same)
    changes = [
        {"c": weights["a"]},
        {"a": weights["a"] + 1},
        {"a": weights["a"].double()},
        {"b": weights["b"].flatten()},
    ]
    assert len({digest({**weights, **change}) for change in [{}, *changes]}) == 5


def test_half_hashes_do_not_depend_on_the_precision_of_storage():
    weights = {"a": torch.randn(5)}
    assert digest(weights, half=True) == digest({"a": weights["a"].half().float()}, half=True)
    assert digest(weights, half=True) == digest({"a": weights["a"].half()}, half=True)
    assert digest(weights) != digest({"a": weights["a"].half()})


def test_raw_bytes_are_the_values_in_order():
    assert raw_bytes(torch.tensor([1, 2], dtype=torch.uint8)).tolist() == [1, 2]
    assert raw_bytes(torch.tensor(258, dtype=torch.int16)).tolist() == [2, 1]
