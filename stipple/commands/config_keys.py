"""List the config keys of a training command, each with its type, its default and what it means.

stipple config train
stipple config train trainer data.folder
stipple config train-autoencoder
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from stipple.cli.argument_parser import Parser
from stipple_core.config import one_line_errors
from stipple_core.nearest import did_you_mean

CONFIGS = {  # training command -> module and name of its config dataclass
    "train": ("stipple.stages.ldm.ldm_run", "LdmRunConfig"),
    "train-autoencoder": ("stipple.stages.autoencoder.autoencoder_run", "AutoencoderRunConfig"),
    "train-classifier": ("stipple.stages.classifier.classifier_run", "ClassifierRunConfig"),
}
REQUIRED = "required"
KEY_WIDTH, TYPE_WIDTH = 44, 24  # columns of the printed list; longer texts move what follows


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """One config key, such as trainer.steps."""

    key: str
    type: str  # as annotated, such as `int | None`; "" for a group of keys
    default: str  # as in YAML, or REQUIRED; "" for a group of keys that is present by default
    comment: str  # what it means: the comment of the dataclass' field


def command_keys(command: str) -> list[ConfigKey]:
    """Return all config keys of a training command, a key of CONFIGS."""
    module, name = CONFIGS[command]
    return list(config_keys(getattr(importlib.import_module(module), name)))


def config_keys(config: type, values: Any = None, prefix: str = "") -> Iterator[ConfigKey]:
    """Yield the keys of a config dataclass in the order of its fields, followed by those of nested dataclasses.

    Args:
        config: the dataclass.
        values: an instance, whose values are the defaults; None: the defaults of the class.
        prefix: of the keys, such as `trainer.`.
    """
    comments, hints = field_comments(config), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = _default(field) if values is None else getattr(values, field.name)
        key, comment = prefix + field.name, comments.get(field.name, "")
        nested = _nested(hints[field.name])
        if nested is None:
            yield ConfigKey(key, _type_name(field.type), _yaml(default), comment)
        else:
            present = dataclasses.is_dataclass(default) or default is dataclasses.MISSING
            yield ConfigKey(key, "", "" if present else _yaml(default), comment or _summary(nested))
            yield from config_keys(nested, default if dataclasses.is_dataclass(default) else None, f"{key}.")


def field_comments(config: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: at the end of its lines, or else above it."""
    source = textwrap.dedent(inspect.getsource(config))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    comments = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            inside = [lines.pop(line) for line in range(node.lineno, node.end_lineno + 1) if line in lines]
            above = []
            while not inside and (line := node.lineno - 1 - len(above)) in lines:
                above.insert(0, lines.pop(line))
            comments[node.target.id] = " ".join(inside or above)
    return comments


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        try:
            return field.default_factory()
        except ValueError:  # a group of keys of which some are required
            return dataclasses.MISSING
    return field.default


def _nested(hint: Any) -> type | None:
    """Return the dataclass that a field holds, also where it may be None."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)


def _summary(config: type) -> str:
    return (config.__doc__ or "").strip().split("\n")[0]


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _yaml(value: Any) -> str:
    """Return a value as it is written in YAML, on one line."""
    if value is dataclasses.MISSING:
        return REQUIRED
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def print_keys(keys: Sequence[ConfigKey]) -> None:
    """Print keys in columns: key and default, type, comment."""
    for row in keys:
        name = f"{row.key}: {row.default}" if row.default else f"{row.key}:"
        print(f"{name:{KEY_WIDTH}} {row.type:{TYPE_WIDTH}} {row.comment}".rstrip())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("config", "COMMAND [KEY ...]", __doc__)
    parser.first.add_argument("command", choices=CONFIGS, help="the training command; `cache` reads those of `train`")
    parser.first.add_argument("keys", nargs="*", metavar="KEY", help="list only these, with all keys below them")
    parser.add_help_flag(parser.first)
    with one_line_errors():
        arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
        keys = command_keys(arguments.command)
        for name in arguments.keys:
            if all(row.key != name for row in keys):
                nearest = did_you_mean(name, [row.key for row in keys])
                raise ValueError(f"{arguments.command} has no config key {name}; did you mean {nearest}?")
    print_keys([row for row in keys if not arguments.keys or _is_below(row.key, arguments.keys)])


def _is_below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


if __name__ == "__main__":
    main()
