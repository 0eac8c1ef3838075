"""Values of a recipe: which kinds a field takes, conversion, and one sentence for what does not fit."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from open_r1_capo.runs.exit import UserError

Kinds = tuple[str, ...]  # names of KINDS, and `null`; empty: the field's owner checks its values
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "values by name",
}
GROUP: Kinds = ("group",)  # settings inside


class ConfigError(UserError, ValueError):
    """A recipe or an override that cannot be used."""


def kinds(hint: Any) -> Kinds:
    """The kinds of value that a type hint takes."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    options = [get_origin(option) or option for option in options]
    if not all(option in KINDS or option is NoneType for option in options):
        return ()
    return tuple("null" if option is NoneType else option.__name__ for option in options)


def schema(kind: type, prefix: str = "") -> dict[str, Kinds]:
    """Full names and kinds of a dataclass's settings, and of those of the dataclasses in it."""
    hints = get_type_hints(kind)
    names: dict[str, Kinds] = {}
    for one in fields(kind):
        name, hint = prefix + one.name, hints[one.name]
        names |= {name: GROUP, **schema(hint, f"{name}.")} if is_dataclass(hint) else {name: kinds(hint)}
    return names


def convert(settings: dict[str, Any], names: dict[str, Kinds], prefix: str = "") -> dict[str, Any]:
    """Convert settings to the kinds in `names`, leaving unknown ones out; raises ConfigError for another kind."""
    converted = {}
    for key, value in settings.items():
        name = prefix + key
        if names.get(name) == GROUP:
            if not isinstance(value, dict | None):
                raise ConfigError(f"{name} is a group of settings, not a value: write {name}.<key>={value}")
            converted[key] = convert(value or {}, names, f"{name}.")
        elif name in names:
            converted[key] = _convert(name, value, names[name])
    return converted


def _convert(name: str, value: Any, wanted: Kinds) -> Any:
    if "dict" in wanted and value is not None:
        return _by_name(name, value)
    kind = "null" if value is None else type(value).__name__
    if not wanted or kind in wanted:
        return value
    if kind == "int" and "float" in wanted:
        return float(value)
    if kind == "str" and "list" in wanted:
        return [value]
    known = {one.__name__: text for one, text in KINDS.items()}
    what = "a number" if {"int", "float"} <= set(wanted) else next(known[one] for one in wanted if one in known)
    raise ConfigError(f"{name} must be {what}, got {'null' if value is None else repr(value)}")


def _by_name(name: str, value: Any) -> Any:
    """The values of a field that takes several by name, also from JSON text; the path of a file of them stays."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    path = isinstance(value, str) and not name.endswith("_kwargs")
    if not isinstance(value, dict) and not path:
        raise ConfigError(f"{name} takes values by name: write {name}.<key>=<value> for each")
    return value


def make(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Build a dataclass of settings and the dataclasses in it, each given as itself or as a dict of its values.

    Raises:
        ConfigError: a dataclass raised ValueError; its message, which begins with a field's name, after `prefix`.
    """
    groups = {name: hint for name, hint in get_type_hints(kind).items() if is_dataclass(hint)}
    inner = {
        name: make(hint, values.get(name, {}), f"{prefix}{name}.")
        for name, hint in groups.items()
        if not isinstance(values.get(name), hint)
    }
    try:
        return kind(**values | inner)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def at_least(low: int, **values: float | None) -> None:
    """Raise ConfigError for the first value below a bound; None passes."""
    for name, value in values.items():
        if value is not None and value < low:
            raise ConfigError(f"{name} must be at least {low}, got {value}")
