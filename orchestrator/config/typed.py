"""Plain values into dataclasses and back, with errors that a person understands.

Used for our own settings, for a user's config dataclass, and in the workers; therefore it needs nothing but the
standard library. Field types: bool, int, float, str, Path, enums, Literal, Any, dataclasses, and lists, tuples, sets,
dicts and unions of them. A field may carry bounds, see `bounded`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.config.names import did_you_mean, nearest
from orchestrator.config.redaction import redact_value
from orchestrator.errors import ConfigError

T = TypeVar("T")


def bounded(
    default: Any, *, minimum: float | None = None, above: float | None = None, maximum: float | None = None
) -> Any:
    """A dataclass field whose value must be >= minimum, > above, <= maximum."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "above": above, "maximum": maximum})


def build(schema: type[T], values: Mapping[str, Any], *, key: str = "") -> T:
    """An instance of the dataclass. Raises ConfigError, which names the dotted key; `key` is where `values` stand."""
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}  # type: ignore[arg-type]
    hints = _hints(schema)
    given: dict[str, Any] = {}
    for name, value in values.items():
        full = _join(key, str(name))
        if name not in fields:
            raise unknown_key(full, value, [_join(key, known) for known in fields])
        given[name] = _bounded(fields[name], full, _convert(hints[name], value, full))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            full = _join(key, name)
            raise ConfigError(
                full, None, f"has no value, and {schema.__name__} has no default for it.", f"Give it: {full}=…"
            )
    try:
        return schema(**given)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        shown = redact_value(key, dict(values)) if values else None
        raise ConfigError(key or schema.__name__, shown, f"{schema.__name__} refuses these values: {error}") from error


def unknown_key(key: str, value: Any, known: Sequence[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""
    hint = did_you_mean(key, known, cutoff=0.5)
    if not hint and known:
        hint = f"Known keys here: {', '.join(sorted(known)[:12])}{', …' if len(known) > 12 else ''}."
    return ConfigError(key, redact_value(key, value), "there is no such key.", hint)


def dump(value: Any, *, key: str = "") -> Any:
    """Plain values (dict, list, str, int, float, bool, None) that `build` turns back into an equal instance."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: dump(getattr(value, field.name), key=_join(key, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, Enum):
        return str(value.value) if isinstance(value, str) else value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {_key_text(name): dump(item, key=_join(key, _key_text(name))) for name, item in value.items()}
    if isinstance(value, Set):
        return sorted((dump(item, key=key) for item in value), key=lambda item: (str(type(item)), item))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [dump(item, key=_join(key, str(index))) for index, item in enumerate(value)]
    why = f"a configuration holds numbers, text, true/false, lists and mappings, not {type(value).__name__}."
    raise ConfigError(key, repr(value)[:80], why)


def schema_keys(schema: type, *, key: str = "") -> dict[str, Any]:
    """Dotted key of every leaf -> its type."""
    hints = _hints(schema)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        full = _join(key, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            found |= schema_keys(hints[field.name], key=full)
        elif field.init:
            found[full] = hints[field.name]
    return found


def defaults(schema: type) -> dict[str, Any]:
    """The plain values of all fields that have a default."""
    hints, found = _hints(schema), {}
    for field in dataclasses.fields(schema):
        if not field.init:
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = dump(field.default, key=field.name)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = dump(field.default_factory(), key=field.name)
        elif dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = defaults(hints[field.name])
    return found


def is_mapping_type(hint: Any) -> bool:
    """Whether any key may stand below a key of this type."""
    kind = typing.get_origin(hint) or hint
    return hint is Any or (isinstance(kind, type) and issubclass(kind, Mapping))


def _hints(schema: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(schema)
    except NameError as error:
        why = f"the types of its fields cannot be resolved: {error}."
        raise ConfigError(
            schema.__qualname__, None, why, "Import them at the top of the module, not under TYPE_CHECKING."
        ) from error


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _key_text(name: Any) -> str:
    return str(dump(name)).lower() if isinstance(name, bool) else str(dump(name))


def _bounded(field: dataclasses.Field[Any], key: str, value: Any) -> Any:
    minimum, above, maximum = (field.metadata.get(name) for name in ("minimum", "above", "maximum"))
    if value is None or (minimum is None and above is None and maximum is None):
        return value
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(key, value, "must be a number.")
    if minimum is not None and value < minimum:
        raise ConfigError(key, value, f"must be at least {minimum}.", f"The nearest is {key}={minimum}.")
    if above is not None and not value > above:
        raise ConfigError(key, value, f"must be greater than {above}.")
    if maximum is not None and value > maximum:
        raise ConfigError(key, value, f"must be at most {maximum}.", f"The nearest is {key}={maximum}.")
    return value


def _convert(hint: Any, value: Any, key: str) -> Any:
    """The value as the type wants it, or ConfigError."""
    if hint in (Any, object) or isinstance(hint, TypeVar):
        return value
    if hasattr(hint, "__supertype__"):
        return _convert(hint.__supertype__, value, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Annotated, typing.Final, typing.Required):
        return _convert(arguments[0], value, key)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is typing.Literal:
        return _one_of({_plain_text(choice): choice for choice in arguments}, value, key)
    kind = origin or hint
    if kind in _SCALARS:
        return _SCALARS[kind](value, key)
    if isinstance(kind, type):
        if issubclass(kind, Enum):
            return _convert_enum(kind, value, key)
        if issubclass(kind, Path):
            return kind(_to_str(value, key))
        if dataclasses.is_dataclass(kind):
            if isinstance(value, kind):
                return value
            if not isinstance(value, Mapping):
                raise _wrong(key, value, f"a group of keys ({', '.join(f.name for f in dataclasses.fields(kind))})")
            return build(kind, value, key=key)
        if issubclass(kind, Mapping):
            return _convert_mapping(arguments, value, key)
        if issubclass(kind, list | tuple | Set | Sequence) and not issubclass(kind, bytes | bytearray):
            return _convert_items(kind, arguments, value, key)
        if isinstance(value, kind):
            return value
    raise ConfigError(
        key,
        redact_value(key, value),
        f"a field of type {_name(hint)} cannot be set from a configuration.",
        "Use numbers, text, bool, enums, dataclasses, lists or dicts.",
    )


def _to_bool(value: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise _wrong(key, value, "true or false")


def _to_int(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        try:
            return int(value.strip())
        except ValueError:
            pass
    raise _wrong(key, value, "a whole number")


def _to_float(value: Any, key: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value.strip().removeprefix(".") if value.strip() in (".inf", ".nan") else value)
        except ValueError:
            pass
    raise _wrong(key, value, "a number")


def _to_str(value: Any, key: str) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | Path):
        return str(value)
    raise _wrong(key, value, "text")


def _to_none(value: Any, key: str) -> None:
    if value is not None:
        raise _wrong(key, value, "null")


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    type(None): _to_none,
    None: _to_none,
}


def _convert_union(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    exact = [choice for choice in choices if type(value) is choice]
    for choice in (*exact, *choices):
        try:
            return _convert(choice, value, key)
        except ConfigError as error:
            if isinstance(value, Mapping) and dataclasses.is_dataclass(choice) and error.key != key:
                raise
    raise _wrong(key, value, " or ".join(_name(choice) for choice in choices))


def _convert_enum(kind: type[Enum], value: Any, key: str) -> Enum:
    if isinstance(value, kind):
        return value
    by_name = {name.lower() if isinstance(value, bool) else name: member for name, member in kind.__members__.items()}
    return _one_of(
        {**{_plain_text(member.value): member for member in kind}, **by_name}, value, key, shown=list(by_name)
    )


def _one_of(choices: Mapping[str, Any], value: Any, key: str, *, shown: Sequence[str] = ()) -> Any:
    text = _plain_text(value)
    if text in choices:
        return choices[text]
    names = list(shown or choices)
    near = nearest(text, names)
    hint = f"The nearest is {key}={near}." if near else ""
    raise ConfigError(key, redact_value(key, value), f"must be one of {', '.join(names)}.", hint)


def _convert_mapping(arguments: tuple[Any, ...], value: Any, key: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(key, value, "a mapping, for example {a: 1, b: 2}")
    key_hint, item_hint = arguments or (Any, Any)
    return {
        _convert(key_hint, name, key): _convert(item_hint, item, _join(key, str(name))) for name, item in value.items()
    }


def _convert_items(kind: type, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    if not isinstance(value, Sequence | Set) or isinstance(value, str | bytes):
        raise _wrong(key, value, "a list, for example [1,2]")
    items = list(value)
    if issubclass(kind, tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            hints = [arguments[0]] * len(items)
        else:
            hints = list(arguments) or [Any] * len(items)
        if len(hints) != len(items):
            raise _wrong(key, value, f"a list of {len(hints)} values")
    else:
        hints = [arguments[0] if arguments else Any] * len(items)
    converted = [
        _convert(hint, item, _join(key, str(i))) for i, (hint, item) in enumerate(zip(hints, items, strict=True))
    ]
    for container in (tuple, frozenset, set):
        if issubclass(kind, container):
            return container(converted)
    return frozenset(converted) if issubclass(kind, Set) else converted


def _plain_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true/false",
        type(None): "null",
        list: "a list",
    }
    return names.get(typing.get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    kinds = {
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        type(None): "null (no value)",
    }
    given = kinds.get(type(value), "a mapping" if isinstance(value, Mapping) else "")
    is_clear = given and not (given == "a number" and "number" in expected)
    why = f"must be {expected}, not {given}." if is_clear else f"must be {expected}."
    return ConfigError(key, redact_value(key, value), why)
