"""`stipple config`: every key of every config, with its type, default and comment."""

from dataclasses import dataclass, field

import pytest

from stipple.commands.config_keys import CONFIGS, REQUIRED, ConfigKey, command_keys, config_keys, main
from stipple_core.config import load_config, to_dict


@dataclass(frozen=True)
class Inner:
    """The inner part. More text."""

    steps: int = 3  # how many
    required: str = field(  # a value without a default
        kw_only=True
    )


@dataclass(frozen=True)
class Part:
    """A part."""

    size: tuple[int, int] = (1, 2)  # both sides


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config."""

    name: str  # of the run
    # above the field,
    # in two lines
    rate: float | None = None
    part: Part = field(default_factory=lambda: Part(size=(3, 4)))
    inner: Inner | None = None  # optional


def test_keys_have_type_default_and_comment():
    assert list(config_keys(Config)) == [
        ConfigKey("name", "str", REQUIRED, "of the run"),
        ConfigKey("rate", "float | None", "null", "above the field, in two lines"),
        ConfigKey("part", "", "", "A part."),
        ConfigKey("part.size", "tuple[int, int]", "[3, 4]", "both sides"),
        ConfigKey("inner", "", "null", "optional"),
        ConfigKey("inner.steps", "int", "3", "how many"),
        ConfigKey("inner.required", "str", REQUIRED, "a value without a default"),
    ]


@pytest.mark.parametrize("command", CONFIGS)
def test_all_keys_of_a_command_are_listed_and_their_defaults_are_those_of_the_config(command):
    from importlib import import_module

    module, name = CONFIGS[command]
    overrides = ["data.folder=x", "autoencoder=y"] if command != "train-autoencoder" else ["data.folder=x"]
    config = to_dict(load_config(getattr(import_module(module), name), None, overrides))
    keys = {row.key: row for row in command_keys(command)}

    def check(values, prefix=""):
        for name, value in values.items():
            assert prefix + name in keys
            if isinstance(value, dict) and any(key.startswith(f"{prefix}{name}.") for key in keys):
                check(value, f"{prefix}{name}.")

    check(config)
    assert keys["trainer.steps"] == ConfigKey("trainer.steps", "int", "100000", "optimizer steps")
    assert sum(not row.comment for row in keys.values()) <= 0.05 * len(keys)


def test_the_command_lists_all_keys_or_those_below_some(capsys):
    main(["train", "ema", "data.folder"])
    keys = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert keys == ["data.folder", "ema", "ema.decay", "ema.warmup", "ema.device"]
