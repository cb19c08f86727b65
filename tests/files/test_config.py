"""Configs: a saved config is read back equal, and each error is one line that names the key."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from stipple_core.config import load_config, one_line_errors, save_config, to_dict


@dataclass(frozen=True, kw_only=True)
class Network:
    channels: tuple[int, ...] = (32, 64)
    heads: int | tuple[int, ...] = 8
    size: tuple[int, int] = (4, 4)
    kind: Literal["kl", "vq"] = "kl"
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"network.rate is {self.rate}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class Run:
    folder: str
    steps: int = 10
    learning_rate: float = 1e-3
    compile: bool = False
    network: Network = field(default_factory=lambda: Network(rate=0.5))
    second: Network | None = None
    where: dict[str, list[Any]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=lambda: ["{text}"])


def write(tmp_path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_saved_configs_are_read_back_equal(tmp_path):
    config = Run(
        folder="a: b # c",
        learning_rate=1e-5,
        second=Network(heads=(1, 2), kind="vq"),
        where={"tone": [None, "x", 3, True]},
    )
    save_config(config, str(tmp_path / "c.yaml"))
    assert load_config(Run, str(tmp_path / "c.yaml")) == config
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_to_dict_returns_plain_values():
    assert to_dict(Run(folder="x"))["network"]["channels"] == [32, 64]


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, "folder: x\nsteps: 3\nnetwork:\n  channels: [1, 2, 3]\n")
    config = load_config(Run, path, ["steps=4", "network.heads=[1,2]", "second.rate=0.25"])
    assert (config.steps, config.learning_rate) == (4, 1e-3)
    assert config.network == Network(
        channels=(1, 2, 3), heads=(1, 2), rate=0.5
    )  # rate: the default of Run, not of Network
    assert config.second == Network(rate=0.25)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    config = load_config(Run, write(tmp_path, "folder: x\nlearning_rate: 1e-4\nsteps: 1e5\n"))
    assert config.learning_rate == 1e-4
    assert config.steps == 100_000 and isinstance(config.steps, int)


def test_whole_numbers_are_read_as_floats_where_floats_are_expected():
    assert isinstance(load_config(Run, None, ["folder=x", "learning_rate=1"]).learning_rate, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "unknown config key stpes; did you mean steps?"),
        ("network.chanels=[1]", "unknown config key network.chanels; did you mean network.channels?"),
        ("zzzz=1", "the valid keys are folder, steps"),
        ("steps=many", "steps is 'many'; it must be a whole number"),
        ("steps=1.5", "steps is 1.5; it must be a whole number"),
        ("steps=true", "steps is True; it must be a whole number"),
        ("steps=null", "steps is None; it must be a whole number"),
        ("compile=1", "compile is 1; it must be true or false"),
        ("folder=012", "it must be text; put it in quotes"),
        ("network=3", "network is 3; it must be a mapping with the keys of Network"),
        ("network.channels=[1,x]", "network.channels[1] is 'x'"),
        ("network.channels=5", "network.channels is 5; it must be a list"),
        ("network.size=[1,2,3]", "must have 2 values"),
        ("network.heads=x", "must be a whole number or a list"),
        ("network.kind=gan", "must be one of kl, vq"),
        ("network.rate=-1", "network.rate is -1.0; it must not be negative"),
        ("where=[1]", "must be a mapping"),
        ("folder=${nothing}", "nothing"),
        ("steps", "not of the form key=value"),
        ("--steps=3", "not of the form key=value"),
        ("steps=[1", "can't be read"),
    ],
)
def test_errors_in_overrides_are_one_line_that_names_the_key(override, message):
    with pytest.raises(ValueError) as caught:
        load_config(Run, None, ["folder=x", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_value_is_named():
    with pytest.raises(ValueError, match="config key folder has no value"):
        load_config(Run, None, [])
    with pytest.raises(ValueError, match="config key folder has no value"):
        load_config(Run, None, ["folder=???"])


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MALICIOUS = {
    "a billion laughs": LAUGHS,
    "a recursive alias": "a: &a [*a]\n",
    "depth": "a: " + "{a: " * 2000 + "1" + "}" * 2000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "a Python name": "folder: !!python/name:os.system\n",
    "a Python object": "folder: !!python/object/new:os.system [id]\n",
    "two documents": "folder: x\n---\nfolder: y\n",
    "a tab": "\tfolder: x\n",
    "a lone surrogate": 'folder: "\\ud800"\n',
    "a number of 5,000 digits": "steps: 1" + "0" * 5000 + "\n",
    "no key": "null: x\n",
    "a key that is a list": "? [a]\n: b\n",
    "a recursive interpolation": "folder: ${folder}\n",
    "an unclosed interpolation": "folder: ${steps\n",
    "an octal number": "folder: 012\n",
    "not a number": "folder: x\nlearning_rate: .nan\n",
    "infinity": "folder: x\nlearning_rate: .inf\n",
    "10 MB": "#" * 10_000_000,
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_files_are_an_error_of_one_line_within_seconds(name, tmp_path):
    path, started = write(tmp_path, MALICIOUS[name]), time.monotonic()
    with pytest.raises(ValueError) as caught:
        load_config(Run, path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and time.monotonic() - started < 3


OVERRIDES = ["folder=" + "[" * 5000, "a" + "{a:" * 3000, "a." * 3000 + "a=1", "folder=\0", "." * 10_000 + "=1"]


@pytest.mark.parametrize("override", [*OVERRIDES, "folder=!!python/name:x", "learning_rate=.nan", "steps=1e400"])
def test_malicious_overrides_are_an_error_of_one_line_within_seconds(override):
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load_config(Run, None, [override])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and time.monotonic() - started < 3


@pytest.mark.parametrize(
    "text",
    [
        "folder: x\nfolder: y\n",
        "folder: [x\n",
        "- a\n",
        "!!python/object/apply:os.getcwd []\n",
        "\x00",
        "[" * 5000,
    ],
    ids=["duplicate key", "open bracket", "list", "python tag", "NUL", "5000 brackets"],
)
def test_unreadable_files_are_an_error_of_one_line(tmp_path, text):
    with pytest.raises(ValueError, match="config file .*config.yaml") as caught:
        load_config(Run, write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_binary_files_are_an_error_of_one_line(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\xd8 folder: x")
    with pytest.raises(ValueError, match="not readable YAML"):
        load_config(Run, str(tmp_path / "c.yaml"))


def test_missing_and_huge_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml does not exist"):
        load_config(Run, str(tmp_path / "nothing.yaml"))
    with pytest.raises(ValueError, match="at most"):
        load_config(Run, write(tmp_path, "#" * (1 << 21)))


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(Network, write(tmp_path, "")) == Network()


@pytest.mark.parametrize(
    "error", [ValueError("bad\n  value"), FileNotFoundError(2, "No such file", "x.yaml"), OSError("y")]
)
def test_user_errors_are_printed_in_one_line_with_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_internal_errors_keep_their_traceback():
    with pytest.raises(TypeError), one_line_errors():
        raise TypeError("a bug")


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(Run, None, ["folder=x"]).steps = 3
