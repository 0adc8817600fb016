"""What a train function gets as `cfg`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from orchestrator.config.names import did_you_mean
from orchestrator.config.redaction import redact
from orchestrator.config.typed import build


class Section(Mapping[str, Any]):
    """A read-only mapping whose keys are also attributes: `cfg.optim.lr`, `cfg["epochs"]`, `cfg.get("hidden", 64)`.

    Keys that are also methods (`items`, `keys`, `values`, `get`, `to_dict`) are reached with brackets. Can be pickled;
    equal to a dict of the same content; shows itself without secrets.
    """

    __slots__ = ("_key", "_values")
    _values: dict[str, Any]
    _key: str

    def __init__(self, values: Mapping[str, Any], key: str = "") -> None:
        object.__setattr__(self, "_key", key)
        object.__setattr__(
            self, "_values", {name: _wrap(value, f"{key}.{name}" if key else name) for name, value in values.items()}
        )

    def __getitem__(self, name: str) -> Any:
        try:
            value = self._values[name]
        except KeyError:
            raise KeyError(self._missing(name)) from None
        return list(value) if isinstance(value, list) else value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(self._missing(name), name=name, obj=self) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"The configuration is read-only: {self._full(name)} cannot be set. Keep your own copy: cfg.to_dict()."
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"The configuration is read-only: {self._full(name)} cannot be deleted.")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return f"Section({redact(self.to_dict())!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Section, (self.to_dict(), self._key)

    def to_dict(self) -> dict[str, Any]:
        """A plain, independent copy."""
        return {name: _unwrap(value) for name, value in self._values.items()}

    def _full(self, name: str) -> str:
        return f"{self._key}.{name}" if self._key else name

    def _missing(self, name: str) -> str:
        near = did_you_mean(self._full(str(name)), map(self._full, self._values))
        have = f"It has: {', '.join(map(self._full, self._values))}." if self._values else "It is empty."
        return f"The configuration has no key {self._full(str(name))}. {near or have}"


def user_config(values: Mapping[str, Any], schema: type | None = None) -> Any:
    """The `cfg` of a train function: an instance of its dataclass, or a Section where it declares none."""
    return Section(values) if schema is None else build(schema, values)


def _wrap(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return Section(value, key)
    if isinstance(value, list | tuple):
        return [_wrap(item, f"{key}.{index}") for index, item in enumerate(value)]
    return value


def _unwrap(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    return [_unwrap(item) for item in value] if isinstance(value, list) else value
