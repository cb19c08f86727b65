"""Frozen dataclasses from YAML files and `key=value` overrides, with errors that name the key and the mend.

OmegaConf reads the YAML (its loader knows `1e-4` as a float, refuses duplicate keys and Python tags), parses the
overrides, merges and resolves interpolations. The typed reading is ours, because OmegaConf's structured configs hand
back lists for tuples, refuse `int | tuple[int, ...]`, and lock frozen dataclasses against the very merge that they
are for.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from stipple_core.files.atomic import writing

MAX_BYTES = 1 << 18  # a config larger than this is some other file
MAX_DEPTH = 20  # dots in the key of an override
MISSING = "???"  # OmegaConf's mark of a value still to be given


def load_config(
    cls: type,
    path: str | None = None,
    overrides: Sequence[str] = (),
    base: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """An instance of the dataclass `cls`: its defaults, then a YAML file, then dotted `key=value` overrides.

    `base` is told what file and overrides say, and gives values that lie under them, above the defaults.

    Raises FileNotFoundError for a missing file; ValueError, in one line, for unreadable YAML, a duplicate key, an
    unknown one (naming the nearest valid one), a wrong type, a missing value, or whatever the dataclass itself
    refuses.
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
    return _read_dataclass(values, cls, None, "")


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file as plain values; interpolations stay text. Raises FileNotFoundError or ValueError, in one line."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(_read_yaml(path), resolve=False)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists, ready for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def require_same(given: Any, expected: Any, where: str, source: str, free: Sequence[str] = ()) -> None:
    """Raise a ValueError naming the first five fields in which two configs of one class differ, except those `free`."""
    names = [field.name for field in dataclasses.fields(given) if field.name not in free]
    pairs = {name: (getattr(given, name), getattr(expected, name)) for name in names}
    wrong = [f"{where}.{name} is {a!r}, not {b!r}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the config is not that of {source}: {'; '.join(wrong[:5])}{more}; leave out what differs")


def save_config(config: Any, path: str) -> None:
    """Write the config as YAML that `load_config` reads back equal; atomically, so that no half file is ever seen."""
    import yaml

    options = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None}
    with writing(path, "w", encoding="utf-8") as file:
        yaml.dump(to_dict(config), file, Dumper=_dumper(), **options)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's mistake (ValueError, OSError) into `error: ...` on stderr and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def short_warnings() -> Iterator[None]:
    """Warnings as one line each, without the line of code that they come from."""
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
        raise FileNotFoundError(f"config file {path} does not exist; give a YAML file, such as one of configs/")
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"config file {path} has {os.path.getsize(path)} bytes, a config has at most {MAX_BYTES}")
    try:
        config = OmegaConf.load(path)
    except RecursionError:
        raise ValueError(f"config file {path} is nested too deeply to be a config") from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise ValueError(f"config file {path} is not readable YAML: {_one_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"config file {path} holds a list or a single value; it must hold `key: value` lines")
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


def _read_dataclass(values: Any, cls: type, default: Any, where: str) -> Any:
    """Read a mapping into `cls`, over the fields of `default` (an instance) if there is one."""
    if not isinstance(values, Mapping):
        raise ValueError(f"config key {where} is {values!r}; it must hold the keys of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    given = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ValueError(f"unknown config key {name}; {_nearest(str(key), list(fields), where)}")
        if value != MISSING:
            given[key] = _read_value(value, hints[key], _default(fields[key], default), name)
    for key, field in fields.items():
        if key not in given and default is None and _default(field, None) is dataclasses.MISSING:
            name = f"{where}.{key}" if where else key
            raise ValueError(f"config key {name} has no value; set it in the YAML file or by {name}=...")
    return cls(**given) if default is None else dataclasses.replace(default, **given)


def _default(field: dataclasses.Field, owner: Any) -> Any:
    if owner is not None:
        return getattr(owner, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _nearest(key: str, valid: list[str], where: str) -> str:
    prefix = f"{where}." if where else ""
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"the keys there are {', '.join(valid)}"


def _read_value(value: Any, hint: Any, default: Any, name: str) -> Any:
    """`value` as the annotation `hint` wants it, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(value, arguments, default, name)
    if origin is typing.Literal and value in arguments:
        return value
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(value, hint, default if isinstance(default, hint) else None, name)
    if (origin or hint) in (list, tuple, Sequence) and isinstance(value, list):
        return _read_list(value, origin or hint, arguments, name)
    if (origin or hint) in (dict, Mapping) and isinstance(value, Mapping):
        key_hint, item_hint = arguments or (Any, Any)
        keys = [_read_value(key, key_hint, None, name) for key in value]
        items = [_read_value(item, item_hint, None, f"{name}.{key}") for key, item in value.items()]
        return dict(zip(keys, items, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # `steps: 1e5`
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config key {name} is {value}; it must be a finite number")
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    mend = "; put it in quotes" if hint is str and isinstance(value, (int, float)) else ""
    raise ValueError(f"config key {name} is {value!r}; it must be {_describe(hint)}{mend}")


def _read_union(value: Any, choices: Sequence[Any], default: Any, name: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = [choice for choice in choices if choice is not type(None)]
    if len(choices) == 1:  # Optional[X]: X's own message says more than ours could
        return _read_value(value, choices[0], default, name)
    for choice in sorted(choices, key=lambda choice: type(value) is not choice):
        try:
            return _read_value(value, choice, default, name)
        except ValueError:
            continue
    raise ValueError(f"config key {name} is {value!r}; it must be {' or '.join(map(_describe, choices))}")


def _read_list(value: list, kind: Any, arguments: tuple, name: str) -> Any:
    fixed = kind is tuple and bool(arguments) and arguments[-1] is not Ellipsis
    if fixed and len(value) != len(arguments):
        raise ValueError(f"config key {name} is {value!r}; it must have {len(arguments)} values")
    hints = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
    items = [_read_value(v, hint, None, f"{name}[{i}]") for i, (v, hint) in enumerate(zip(value, hints, strict=True))]
    return items if kind is list else tuple(items)


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin in (list, tuple, Sequence) and typing.get_args(hint):
        return f"a list, each {_describe(typing.get_args(hint)[0])}"
    if origin in (dict, Mapping):
        return "a mapping of `key: value`"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _dumper() -> type:
    """A safe dumper that writes a list in full each time it occurs, where YAML would write `&id001` and `*id001`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Dumper
