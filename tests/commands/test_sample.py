"""Models that are not conditioned on text: unconditional ones, classes by name or number, maps."""

import numpy as np
import pytest
from PIL import Image

import stipple.commands.sample as sample
from tests.helpers.models.drawn import folder_of, pixels, record, refused, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: folder_of(kind, tmp_path_factory.mktemp(kind)) for kind in ("unconditional", "class", "semantic")}


def test_an_unconditional_model_requires_no_prompt(folders, tmp_path, capsys):
    words = ("-n", 2, "--steps", 2, "--checkpoint", folders["unconditional"])
    paths = run(sample.main, capsys, tmp_path / "out", *words)
    assert len(paths) == 2 and (pixels(paths[0]) != pixels(paths[1])).any()
    (again,) = run(sample.main, capsys, tmp_path / "out", "--like", paths[1])
    assert again.read_bytes() == paths[1].read_bytes()


def test_classes_are_names_or_numbers_and_each_is_a_picture(folders, tmp_path, capsys):
    words = ("--steps", 2, "--checkpoint", folders["class"], "--seed", 5)
    by_name, other = run(sample.main, capsys, tmp_path / "out", *words, "--class-name", "boot", "--class-name", "bag")
    (by_number,) = run(sample.main, capsys, tmp_path / "out", *words, "--class-name", 1)
    assert np.array_equal(pixels(by_name), pixels(by_number)) and (pixels(by_name) != pixels(other)).any()
    assert [record(path)["pictures"][0]["prompt"] for path in (by_name, other)] == ["boot", "bag"]


def test_a_map_sets_size_and_classes_of_the_picture(folders, tmp_path, capsys):
    for name, number in (("zeros", 0), ("ones", 1)):
        Image.new("L", (30, 22), number).save(tmp_path / f"{name}.png")
    words = ("--steps", 2, "--checkpoint", folders["semantic"], "--map")
    made = [
        run(sample.main, capsys, tmp_path / "out", *words, tmp_path / f"{name}.png")[0] for name in ("zeros", "ones")
    ]
    assert Image.open(made[0]).size == (30, 22) and (pixels(made[0]) != pixels(made[1])).any()
    (again,) = run(sample.main, capsys, tmp_path / "out", "--like", made[1])
    assert again.read_bytes() == made[1].read_bytes()


def test_invalid_requests_are_one_line(folders, tmp_path, capsys):
    Image.new("RGB", (30, 22)).save(tmp_path / "colors.png")
    for kind, words, expected in (
        ("unconditional", ["--prompt", "a cat"], "can't be used: this model is unconditional; leave it empty"),
        ("class", ["--class-name", "shirt"], "is not a class of this model"),
        ("semantic", [], "this model requires a semantic map, and there is none; add a map"),
        ("semantic", ["--map", tmp_path / "colors.png"], "colors.png can't be used: a map has one channel"),
    ):
        error = refused(sample.main, capsys, tmp_path / "out", "--checkpoint", folders[kind], *words)
        assert expected in error
