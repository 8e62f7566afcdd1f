"""YAML and `section.field=value` overrides to dataclasses, with errors that name the field and what would work."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rcm_mcore.config.model import SIZES, ModelConfig, fields_of_size
from rcm_mcore.config.schema import Config


class ConfigError(ValueError):
    """What a user wrote in a configuration cannot be used."""


T = TypeVar("T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path`, apply overrides such as `optim.lr=1e-5`, and check everything that needs no process group.

    Raises ConfigError naming the field, the value and what would be accepted.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections such as `model:` and `train:`")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Build a Config from nested dictionaries (what YAML gives)."""
    return _build(Config, tree, "")


def parse_model(tree: dict[str, Any]) -> ModelConfig:
    """Build the `model` section alone, as a checkpoint stores it."""
    return _build(ModelConfig, tree, "model")


def to_yaml(config: Config) -> str:
    """The resolved configuration; parsing it gives the same Config."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: write section.field=value, such as optim.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    node[leaf] = value


def _build(cls: type[T], tree: Any, path: str) -> T:
    where = f"{path}." if path else ""
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}={tree!r}: must be a section with fields, not {_kind(tree)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {where}{close[0]}?" if close else f"known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {where}{key}: {hint}")
    if cls is ModelConfig:
        tree = _with_size(tree, where)
    hints = get_type_hints(cls)
    values = {key: _convert(value, hints[key], f"{where}{key}") for key, value in tree.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing: {', '.join(where + name for name in missing)}")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _with_size(tree: dict[str, Any], where: str) -> dict[str, Any]:
    family, size = str(tree.get("family", "wan")), tree.get("size")
    if size is None:
        raise ConfigError(f"missing: {where}size (one of {', '.join(SIZES.get(family, SIZES['wan']))})")
    try:
        return {**fields_of_size(family, str(size), str(tree.get("condition", "text"))), **tree}
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, path)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _convert(value, inner, path)
    if origin is Literal:
        if str(value) in args:
            return str(value)
        close = difflib.get_close_matches(str(value), args, n=1)
        hint_text = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"{path}={value!r}: must be one of {', '.join(args)}{hint_text}")
    if origin is tuple:
        if isinstance(value, str) and args[0] is str:
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}={value!r}: must be a list, not {_kind(value)}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{path}={value!r}: must have {len(args)} entries")
        return tuple(_convert(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    return _scalar(value, hint, path)


def _scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float:
        # YAML reads 1e-6 (no dot) as a string.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
        raise ConfigError(f"{path}={value!r}: must be a number, not {_kind(value)}")
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = {int: "a whole number", bool: "true or false", str: "a string"}[kind]
    raise ConfigError(f"{path}={value!r}: must be {wanted}, not {_kind(value)}")


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a whole number", float: "a number", str: "a string", list: "a list", dict: "a section"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
