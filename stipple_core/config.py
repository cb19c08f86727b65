"""Configs: frozen dataclasses read from a YAML file and `key=value` overrides, and written back as YAML.

OmegaConf reads the YAML (its loader reads `1e-4` as a float and rejects duplicate keys and Python tags), parses the
overrides, merges, and resolves interpolations. `stipple_core.typed_values` checks names and types.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from stipple_core.files.atomic import writing
from stipple_core.typed_values import read_dataclass

MAX_BYTES = 1 << 18  # a larger file is not a config
MAX_DEPTH = 20  # dots in the key of an override


def load_config(
    cls: type,
    path: str | None = None,
    overrides: Sequence[str] = (),
    base: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """Return an instance of the dataclass `cls`: its defaults, then a YAML file, then dotted `key=value` overrides.

    Args:
        cls: the dataclass.
        path: the YAML file. None: no file.
        overrides: strings `key=value`; a dot in the key separates nested keys.
        base: called with the values of file and overrides. It returns values that take precedence over the defaults,
            but not over file and overrides.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the YAML is unreadable, a key is duplicate or unknown (the message names the nearest valid one), a
            value is missing or has another type, or the dataclass itself rejects a value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.create({}) if path is None else _read_yaml(path)
    try:
        for override in overrides:
            merged = OmegaConf.merge(merged, _read_override(override))
        if base is not None:
            merged = OmegaConf.merge(base(OmegaConf.to_container(merged, resolve=True)), merged)
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {_one_line(error)}") from None
    return read_dataclass(values, cls)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file as plain values; interpolations stay text. Raises FileNotFoundError or ValueError."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(_read_yaml(path), resolve=False)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as nested dicts and lists, for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def require_same(config: Any, expected: Any, where: str, source: str, free: Sequence[str] = ()) -> None:
    """Raise a ValueError that names the first five fields in which two configs of one class differ.

    Args:
        config: the user's config.
        expected: the config that it must be equal to.
        where: the key of `config`, for the message.
        source: where `expected` comes from, for the message.
        free: names of fields that may differ.
    """
    names = [field.name for field in dataclasses.fields(config) if field.name not in free]
    pairs = {name: (getattr(config, name), getattr(expected, name)) for name in names}
    wrong = [f"{where}.{name} is {a!r}, not {b!r}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the config is not that of {source}: {'; '.join(wrong[:5])}{more}; leave out what differs")


def save_config(config: Any, path: str) -> None:
    """Write the config as YAML, atomically. `load_config` reads back an equal config."""
    import yaml

    options = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None}
    with writing(path, "w", encoding="utf-8") as file:
        yaml.dump(to_dict(config), file, Dumper=_dumper(), **options)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a user error (ValueError, OSError) as `error: ...` on stderr without a traceback, and exit with code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print each warning as one line, without the line of code that it comes from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _read_yaml(path: str) -> Any:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not os.path.isfile(path):
        raise FileNotFoundError(f"config file {path} does not exist; use a YAML file, such as one of configs/")
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"config file {path} has {os.path.getsize(path)} bytes, a config has at most {MAX_BYTES}")
    try:
        config = OmegaConf.load(path)
    except RecursionError:
        raise ValueError(f"config file {path} is nested too deeply to be a config") from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise ValueError(f"config file {path} is not readable YAML: {_one_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"config file {path} contains a list or a single value; it must contain `key: value` lines")
    return config


def _read_override(override: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, _ = override.partition("=")
    shown = repr(override if len(override) <= 100 else f"{override[:100]}...")
    if not equals or not all(key.split(".")) or key.startswith("-") or key.count(".") > MAX_DEPTH:
        raise ValueError(f"override {shown} is not of the form key=value, such as unet.layers_per_block=1")
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"override {shown} can't be read: {_one_line(error)[:300]}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _dumper() -> type:
    """A safe YAML dumper that repeats equal lists in full, instead of writing `&id001` and `*id001`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Dumper
