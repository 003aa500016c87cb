"""Configs from plain data: nested dataclasses out of JSON or YAML, with every unknown or ill-typed entry named."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from shared.errors import UserError

T = TypeVar("T")


def with_entries(config: T, entries: Mapping[str, Any], where: str = "config") -> T:
    """The dataclass with some entries replaced; nested mappings go into nested dataclasses. Raises UserError."""
    kind: Any = type(config)
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    changes: dict[str, Any] = {}
    for name, value in entries.items():
        if name not in known:
            raise UserError(f"{where}.{name} is no entry of {kind.__name__}.", f"Known: {', '.join(sorted(known))}.",
                            "invalid_training")  # fmt: skip
        current = getattr(config, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            changes[name] = with_entries(current, value, f"{where}.{name}")
        else:
            changes[name] = _checked(value, hints[name], f"{where}.{name}")
    changed: Any = config
    return replace(changed, **changes)  # type: ignore[no-any-return]


def read_config(path: Path) -> dict[str, Any]:
    """The entries in a JSON or YAML file. Raises UserError for a file that holds no mapping."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}.", code="invalid_training") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no mapping of names to values.", code="invalid_training")
    return document


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """ "ppo.loop.lr=1e-5" and the like as nested entries. Raises UserError for one without "="."""
    entries: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise UserError(
                f"{assignment!r} is no assignment.", "Write name=value, e.g. loop.lr=1e-5.", "invalid_training"
            )
        *parents, last = path.split(".")
        place = entries
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(text)
    return entries


def _checked(value: Any, hint: Any, where: str) -> Any:
    """The value as its type; YAML reads 1e-5 as text, and whole numbers stand for floats."""
    origin = get_origin(hint)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise UserError(
            f"{where} is {value!r}.", f"It can be {', '.join(map(repr, get_args(hint)))}.", "invalid_training"
        )
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return None if value is None else _checked(value, kinds[0], where)
    try:
        if hint is float and not isinstance(value, bool):
            return float(value)
        if hint in (int, bool, str) and isinstance(value, hint) and (hint is not int or not isinstance(value, bool)):
            return value
    except (TypeError, ValueError):
        pass
    raise UserError(f"{where} is {value!r}, not {getattr(hint, '__name__', hint)}.", code="invalid_training")
