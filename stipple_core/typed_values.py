"""Typed reading of plain values: mappings, lists and numbers of YAML or JSON become frozen dataclasses, or an error.

OmegaConf's structured configs are not used for this: they return lists for tuples, refuse `int | tuple[int, ...]`, and
cannot merge into frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from stipple_core.nearest import did_you_mean

MISSING = "???"  # OmegaConf's marker of a value that is still to be set


def read_dataclass(values: Any, cls: type, default: Any = None, where: str = "") -> Any:
    """Build an instance of a dataclass from a mapping, and check names and types.

    Args:
        values: the mapping, with nested mappings for nested dataclasses.
        cls: the dataclass. Its annotations are the types to check.
        default: an instance of `cls` that has the values of missing keys. None: the defaults of `cls`.
        where: the key of `values` in the config, for error messages; "" for the config itself.

    Raises:
        ValueError: a key is unknown (the message names the nearest valid one), a value is missing or has another type,
            or the dataclass itself rejects the values.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"config key {where} is {values!r}; it must be a mapping with the keys of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    read = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ValueError(f"unknown config key {name}; {_suggestion(str(key), list(fields), where)}")
        if value != MISSING:
            read[key] = _read_value(value, hints[key], _default(fields[key], default), name)
    for key, field in fields.items():
        if key not in read and default is None and _default(field, None) is dataclasses.MISSING:
            name = f"{where}.{key}" if where else key
            raise ValueError(f"config key {name} has no value; set it in the YAML file or by {name}=...")
    return cls(**read) if default is None else dataclasses.replace(default, **read)


def _default(field: dataclasses.Field, owner: Any) -> Any:
    if owner is not None:
        return getattr(owner, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _suggestion(key: str, valid: list[str], where: str) -> str:
    if nearest := did_you_mean(key, valid, cutoff=0.5):
        return f"did you mean {f'{where}.' if where else ''}{nearest}?"
    return f"the valid keys are {', '.join(valid)}"


def _read_value(value: Any, hint: Any, default: Any, name: str) -> Any:
    """Return `value` as the type of the annotation `hint`. Raises ValueError if it has another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(value, arguments, default, name)
    if origin is typing.Literal and value in arguments:
        return value
    if dataclasses.is_dataclass(hint):
        return read_dataclass(value, hint, default if isinstance(default, hint) else None, name)
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
    fix = "; put it in quotes" if hint is str and isinstance(value, (int, float)) else ""
    raise ValueError(f"config key {name} is {value!r}; it must be {_describe(hint)}{fix}")


def _read_union(value: Any, choices: Sequence[Any], default: Any, name: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = [choice for choice in choices if choice is not type(None)]
    if len(choices) == 1:  # X | None: the error message of X is more specific
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
