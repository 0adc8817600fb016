"""The space of a sweep: what each searched key may be, how values are drawn from it, and what is refused.

A draw is a function of the sweep's seed, the trial's number and the key alone: adding or removing a key leaves what the
others draw as it was, and a sweep that is resumed or extended goes on with the same sequence.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from statistics import NormalDist
from typing import Any, NoReturn

from orchestrator.config.names import did_you_mean, nearest
from orchestrator.config.redaction import redact_value
from orchestrator.errors import ConfigError, UserError
from orchestrator.seeding import derive
from orchestrator.sweeps.constraints import KEY as CONSTRAINTS_KEY
from orchestrator.sweeps.constraints import Constraint
from orchestrator.sweeps.grammar import (
    Condition,
    Expression,
    from_config,
    literal,
    parse,
    read_literal,
    refuse,
    same,
    token,
)

MAX_RETRIES = 1000
"""So often a configuration is drawn anew that a constraint refuses."""

MAX_GRID = 100_000
_MAX_MULTIPLES = 10**11
"""Multiples of a step have 12 digits; further from zero neighbours would become one number."""
_WIDEST = 2**53
"""One of more whole numbers cannot be drawn from a double in [0, 1)."""
_SMALLEST_MASS = 1e-9
_NOT_SEARCHED = ("run", "storage", "tracking", "database", "mlflow", "ray", "redis", "submit", "provenance", "sweep")
"""Sections that say where a run belongs and is kept: the same for all trials."""


class Kind(StrEnum):
    """How a key's values are spread."""

    uniform = "uniform"
    loguniform = "loguniform"
    quniform = "quniform"
    qloguniform = "qloguniform"
    randint = "randint"
    lograndint = "lograndint"
    qrandint = "qrandint"
    normal = "normal"
    qnormal = "qnormal"
    lognormal = "lognormal"
    choice = "choice"
    grid = "grid"
    fixed = "fixed"


_LISTED = (Kind.choice, Kind.grid, Kind.fixed)
_WHOLE = (Kind.randint, Kind.lograndint, Kind.qrandint)
_LOG = (Kind.loguniform, Kind.qloguniform, Kind.lograndint)
_NORMAL = (Kind.normal, Kind.qnormal, Kind.lognormal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One searched key. `dimension` makes it from text; `text` is that text again.

    Example: Dimension(key="optim.lr", kind=Kind.loguniform, low=1e-4, high=0.1).
    """

    key: str
    kind: Kind
    low: float = -math.inf
    high: float = math.inf
    """Both ends are included."""
    step: float = 0.0
    """Values are its multiples; 0: all values."""
    mu: float = 0.0
    sigma: float = 0.0
    """Of the normal distribution; of the value's logarithm for `lognormal`."""
    items: tuple[Any, ...] = ()
    """Of choice, grid and fixed: any JSON."""
    when: Condition | None = None

    @property
    def is_grid(self) -> bool:
        return self.kind is Kind.grid

    @property
    def is_drawn(self) -> bool:
        return self.kind not in (Kind.grid, Kind.fixed)

    @property
    def is_listed(self) -> bool:
        """Whether `items` are all its values; else it is a range of numbers."""
        return self.kind in _LISTED

    @property
    def is_whole(self) -> bool:
        return self.kind in _WHOLE

    @property
    def is_log(self) -> bool:
        return self.kind in _LOG

    @property
    def text(self) -> str:
        """As the grammar reads it: `loguniform(0.0001, 0.1)`."""
        arguments: tuple[Any, ...] = self.items
        if not self.is_listed:
            ends = (self.low, self.high)
            default = (0.0 if self.kind is Kind.lognormal else -math.inf, math.inf)
            spread = (self.mu, self.sigma) if self.kind in _NORMAL else ends
            tail = ends if self.kind in _NORMAL and ends != default else ()
            arguments = (*spread, *([self.step] if self.step else []), *tail)
        inside = ", ".join(map(literal, arguments))
        if len(self.items) == 1 and isinstance(self.items[0], list) and self.kind is not Kind.fixed:
            inside = f"[{inside}]"  # or the one list would be taken for the list of items
        domain = f"{self.kind}({inside})"
        return f"when({self.when}, {domain})" if self.when else domain

    @property
    def words(self) -> str:
        """For people: `loguniform 0.0001 … 0.1`, `grid 16, 32, 64 when kind == 'a'`."""
        if self.is_listed:
            items = redact_value(self.key, self.items)
            said = f"{self.kind} {', '.join(item if isinstance(item, str) else literal(item) for item in items)}"
        else:
            bounds = f"{self.low:.12g} … {self.high:.12g}"
            if self.kind in _NORMAL:
                bounds = f"{self.mu:.12g} ± {self.sigma:.12g}, {bounds}"
            said = f"{self.kind} {bounds}" + (f" in steps of {self.step:.12g}" if self.step else "")
        return f"{said} when {self.when}" if self.when else said

    def value(self, r: float) -> Any:
        """The value at `r`, 0 <= r < 1: as r is uniform, values are spread as the kind says."""
        low, high = self.low, self.high
        match self.kind:
            case Kind.choice | Kind.grid | Kind.fixed:
                return copy.deepcopy(self.items[min(int(r * len(self.items)), len(self.items) - 1)])
            case Kind.randint | Kind.qrandint:
                return self.fitted(low + math.floor(r * (high - low + 1)))
            case Kind.lograndint:
                # n is as likely as log(n + 1) - log(n).
                return self.fitted(math.floor(math.exp(math.log(low) + (math.log(high + 1) - math.log(low)) * r)))
            case Kind.loguniform | Kind.qloguniform:
                return self.fitted(math.exp(math.log(low) + (math.log(high) - math.log(low)) * r))
            case Kind.uniform | Kind.quniform:
                return self.fitted(low + (high - low) * r)
            case Kind.normal | Kind.qnormal:
                return self.fitted(_normal_value(self.mu, self.sigma, low, high, r))
            case Kind.lognormal:
                logs = (math.log(low) if low > 0 else -math.inf, math.log(high))
                return self.fitted(math.exp(_normal_value(self.mu, self.sigma, *logs, r)))

    def fitted(self, number: float) -> float | int:
        """The number of this range next to `number`: between the ends, a multiple of the step, whole where it must
        be. Only for ranges, not for lists of items."""
        if self.step:
            first, last = self._multiples()
            count = min(max(number / self.step, first), last)
            number = round(count) * self.step
            if not self.is_whole:
                number = float(f"{number:.12g}")
        number = min(max(number, self.low), self.high)
        return int(number) if self.is_whole else float(number)

    def share(self, value: float) -> float:
        """The r at which `value` has this value, for the normal kinds without a step."""
        low, high = self.low, self.high
        if self.kind is Kind.lognormal:
            low, high, value = math.log(low) if low > 0 else -math.inf, math.log(high), math.log(value)
        spread = NormalDist(self.mu, self.sigma)
        begin, end = _mass(spread, low, high)
        return (spread.cdf(value) - begin) / (end - begin)

    def middle(self) -> Any:
        """A value for where one is needed and none was suggested: the middle (geometric for logarithmic kinds), the
        first of a list."""
        if self.is_listed:
            return copy.deepcopy(self.items[0])
        if self.kind is Kind.lognormal:
            return self.fitted(math.exp(self.mu))
        if self.kind in _NORMAL:
            return self.fitted(self.mu)
        return self.fitted(math.sqrt(self.low) * math.sqrt(self.high) if self.is_log else self.low / 2 + self.high / 2)

    def probes(self) -> tuple[Any, ...]:
        """The values whose type is like that of all others: the ends of a range, each item of a list."""
        if self.is_listed:
            return self.items
        ends = (self.fitted(end) for end in (self.low, self.high) if math.isfinite(end))
        return (*ends, *([self.middle()] if self.kind in _NORMAL else []))

    def why_not(self, value: Any) -> str:
        """Why `value` is none of this key's values; "" if it is one."""
        if self.is_listed:
            if any(same(value, item) for item in self.items):
                return ""
            words = [item for item in self.items if isinstance(item, str)]
            near = did_you_mean(value, words) if isinstance(value, str) else ""
            return f"is none of {', '.join(literal(redact_value(self.key, item)) for item in self.items[:12])}." + (
                f" {near}" if near else ""
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "is no number."
        if not math.isfinite(value):
            return "is not finite."
        if not self.low <= value <= self.high:
            return f"is outside {self.low:.12g} … {self.high:.12g}."
        if self.is_whole and value != int(value):
            return "is no whole number."
        if self.step and not math.isclose(self.fitted(value), value, rel_tol=1e-9, abs_tol=self.step * 1e-6):
            return f"is no multiple of {self.step:.12g}."
        return ""

    def _multiples(self) -> tuple[int, int]:
        """The first and the last multiple of the step that lie between the ends, in steps from zero."""
        slack = 0.0 if self.is_whole else 1e-9  # 0.3 / 0.1 is a little below 3
        first = math.ceil(self.low / self.step - slack) if math.isfinite(self.low) else -_MAX_MULTIPLES
        last = math.floor(self.high / self.step + slack) if math.isfinite(self.high) else _MAX_MULTIPLES
        return first, last


def _normal_value(mu: float, sigma: float, low: float, high: float, r: float) -> float:
    spread = NormalDist(mu, sigma)
    begin, end = _mass(spread, low, high)
    # The ends of (0, 1) have no finite value.
    share = min(max(begin + (end - begin) * r, 2.0**-53), 1 - 2.0**-53)
    return min(max(spread.inv_cdf(share), low), high)


def _mass(spread: NormalDist, low: float, high: float) -> tuple[float, float]:
    return (spread.cdf(low) if low > -math.inf else 0.0), (spread.cdf(high) if high < math.inf else 1.0)


# -- from text to a dimension --------------------------------------------------------------------------------


def dimension(key: str, given: Any) -> Dimension:
    """The domain of one key, from text or from a mapping as `sweep.space` has them.

    Raises ConfigError that names key and value: no domain, an empty range, a logarithm of what is not positive, a step
    without a multiple inside, nothing or the same thing twice to choose from.
    """
    _check_key(key, given)
    return _dimension(key, given, from_config(key, given))


def searched(key: str, text: str) -> Dimension | None:
    """The domain that an override asks for; None if `text` is one value. Raises ConfigError as `dimension` does."""
    expression = parse(key, text)
    if expression is None:
        return None
    _check_key(key, text)
    return _dimension(key, text, expression)


def _check_key(key: str, given: Any) -> None:
    if not key or not all(key.split(".")):
        refuse(key or "sweep.space", given, "is no key.", "A key is a name, or names with dots: optim.lr.")
    section = key.partition(".")[0]
    if section in _NOT_SEARCHED:
        why = f"cannot be searched: {section}.* is one for all trials of a sweep."
        refuse(key, given, why, "Give it one value.")


def _dimension(key: str, given: Any, written: Expression) -> Dimension:
    build = _BUILDERS.get(written.name, _range_of_numbers)
    found = build(_Written(key, given, written))
    for item in (*found.items, *([found.when.value] if found.when else [])):
        if "${" in literal(item):
            refuse(
                key, given, "holds ${…}: what is searched is given in plain values.", "Search the other key instead."
            )
    return found


class _Written:
    """What was written for a key, and how it is refused."""

    def __init__(self, key: str, given: Any, expression: Expression) -> None:
        self.key, self.given, self.name = key, given, expression.name
        self.arguments, self.when = expression.arguments, expression.when

    def refuse(self, why: str, hint: str = "") -> NoReturn:
        refuse(self.key, self.given, why, hint)

    def shown(self, value: Any) -> str:
        return literal(redact_value(self.key, value))

    def number(self, value: Any, *, is_whole: bool = False, may_be_infinite: bool = False) -> float:
        """Whole numbers stay exact, the others become floats."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"{self.shown(value)} is no number.")
        if isinstance(value, float) and not math.isfinite(value):
            if may_be_infinite and not math.isnan(value):
                return value
            self.refuse(f"{self.shown(value)} is not finite.")
        if is_whole:
            if value != int(value):
                self.refuse(f"{self.shown(value)} is no whole number.", f"Use {self._for_floats()}.")
            return int(value)
        try:
            return float(value)
        except OverflowError:
            self.refuse("is beyond what a float can hold.")

    def _for_floats(self) -> str:
        return {"randint": "uniform", "lograndint": "loguniform"}.get(self.name, "quniform")


def _range_of_numbers(written: _Written) -> Dimension:
    kind = Kind("uniform" if written.name == "interval" else written.name)
    whole, logarithmic = kind in _WHOLE, kind in _LOG
    low, high, *rest = (written.number(value, is_whole=whole) for value in written.arguments)
    if low >= high:
        hint = f"Did you mean {written.name}({literal(high)}, {literal(low)})?" if low > high else "Use fixed(…)."
        written.refuse(f"is empty: {literal(low)} is not below {literal(high)}.", hint)
    if logarithmic and low <= 0:
        written.refuse(f"has no logarithm: {literal(low)} is not above 0.", f"Use {kind.value.replace('log', '')}.")
    if max(abs(low), abs(high)) >= _WIDEST if whole else not math.isfinite(high - low):
        written.refuse("is too wide: its width or its ends are beyond what can be drawn evenly.")
    found = Dimension(key=written.key, kind=kind, low=low, high=high, step=rest[0] if rest else 0.0, when=written.when)
    return _with_step(written, found) if rest else found


def _normal(written: _Written) -> Dimension:
    kind = Kind(written.name)
    mu, sigma, *rest = written.arguments
    step = written.number(rest.pop(0)) if kind is Kind.qnormal else 0.0
    mu, sigma = written.number(mu), written.number(sigma)
    if sigma <= 0:
        written.refuse(f"the standard deviation {sigma:.12g} is not above 0.", "Use fixed(…) for a constant.")
    default = (0.0 if kind is Kind.lognormal else -math.inf, math.inf)
    low, high = (*(written.number(end, may_be_infinite=True) for end in rest), *default[len(rest) :])
    if low >= high:
        written.refuse(f"is empty: {low:.12g} is not below {high:.12g}.")
    logs = (low, high)
    if kind is Kind.lognormal:
        if low < 0:
            written.refuse(f"is never negative, its lower end {low:.12g} is.", "Use normal, or 0.")
        logs = (math.log(low) if low > 0 else -math.inf, math.log(high))
        if min(mu + 9 * sigma, logs[1]) > 700:
            written.refuse("is beyond what a float can hold: mu and sigma are of the logarithm.")
    begin, end = _mass(NormalDist(mu, sigma), *logs)
    if end - begin < _SMALLEST_MASS:
        written.refuse(f"next to nothing of it lies between {low:.12g} and {high:.12g}.", "Use uniform.")
    found = Dimension(key=written.key, kind=kind, low=low, high=high, step=step, mu=mu, sigma=sigma, when=written.when)
    return _with_step(written, found) if kind is Kind.qnormal else found


def _with_step(written: _Written, found: Dimension) -> Dimension:
    if found.step <= 0:
        written.refuse(f"the step {found.step:.12g} is not above 0.")
    ends = [abs(end) for end in (found.low, found.high) if math.isfinite(end)]
    if any(end / found.step > _MAX_MULTIPLES for end in ends):
        written.refuse(f"the step {found.step:.12g} is too fine for these ends.", "Leave the step out.")
    first, last = found._multiples()
    if first > last:
        near = round((found.low + found.high) / 2 / found.step) * found.step
        why = f"no multiple of {found.step:.12g} lies between {found.low:.12g} and {found.high:.12g}."
        written.refuse(why, f"The nearest is {near:.12g}.")
    return found


def _listed(written: _Written) -> Dimension:
    items = written.arguments
    if len(items) == 1 and isinstance(items[0], list):
        items = tuple(items[0])
    return _checked_items(written, Kind(written.name), items)


def _boolean(written: _Written) -> Dimension:
    return _checked_items(written, Kind.choice, (True, False))


def _fixed(written: _Written) -> Dimension:
    return _checked_items(written, Kind.fixed, written.arguments)


def _counted(written: _Written) -> Dimension:
    """range(a, b, step) as Hydra has it: b is not in it; range(b) starts at 0."""
    given = [written.number(value, is_whole=isinstance(value, int)) for value in written.arguments]
    start, stop, step = (0, given[0], 1) if len(given) == 1 else (*given, 1)[:3]
    if step == 0:
        written.refuse("the step is 0.")
    count = math.ceil((stop - start) / step - 1e-9)
    if count <= 0:
        written.refuse(f"is empty: it goes from {literal(start)} to before {literal(stop)} by {literal(step)}.")
    if count > MAX_GRID:
        written.refuse(f"has {count} values, more than {MAX_GRID}.", "Use randint or quniform.")
    values = [start + place * step for place in range(count)]
    items = tuple(value if isinstance(value, int) else float(f"{value:.12g}") for value in values)
    return _checked_items(written, Kind.grid, items)


def _checked_items(written: _Written, kind: Kind, items: tuple[Any, ...]) -> Dimension:
    if not items:
        written.refuse("there is nothing to choose from.", f"Write {kind}(x, y, …).")
    seen: set[str] = set()
    for item in items:
        if isinstance(item, float) and not math.isfinite(item):
            written.refuse(f"{written.shown(item)} is not finite.")
        if token(item) in seen:
            written.refuse(f"{written.shown(item)} is there twice.", "Repetitions with other seeds: sweep.seeds.")
        seen.add(token(item))
    return Dimension(key=written.key, kind=kind, items=items, when=written.when)


_BUILDERS: Mapping[str, Callable[[_Written], Dimension]] = {
    "normal": _normal,
    "qnormal": _normal,
    "lognormal": _normal,
    "choice": _listed,
    "grid": _listed,
    "boolean": _boolean,
    "range": _counted,
    "fixed": _fixed,
}


# -- the space -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Space:
    """All searched keys, in the order in which they were given, and what must hold between them.

    `configured` are the values of keys that conditions and constraints read when they are not searched, or not in this
    trial. Raises ConfigError when made from what contradicts itself: a condition on a key that is not searched, on the
    key itself or in a circle, or that never holds; a constraint on an unknown key; a grid that is too large or that
    the constraints leave nothing of. `check` tries draws besides.
    """

    dimensions: tuple[Dimension, ...]
    constraints: tuple[str, ...] = ()
    configured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [each.key for each in self.dimensions]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(key, None, "is searched twice.")
        self._check_conditions()
        for constraint in self._constraints:
            constraint.check_keys({*keys, *self.configured})
        if any(each.is_grid for each in self.dimensions) and not self._grid:
            hint = "No combination of the grid meets them."
            raise ConfigError(CONSTRAINTS_KEY, list(self.constraints), "leave nothing of the grid.", hint)

    @property
    def is_drawn(self) -> bool:
        """Whether anything is drawn at random; else the grid is all there is."""
        return any(each.is_drawn for each in self.dimensions)

    @cached_property
    def hash(self) -> str:
        """SHA-256, 16 hexadecimal digits; spaces that draw the same have the same one."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]

    def __getitem__(self, key: str) -> Dimension:
        return self._by_key[key]

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """The values of trial `number`; of grid keys one at random. Raises UserError as `drawn` does."""
        return self.drawn(seed, number)[0]

    def drawn(
        self, seed: int, number: int, given: Mapping[str, Any] | None = None, *, keep: bool = False
    ) -> tuple[dict[str, Any], int]:
        """Values in the order of the dimensions, and how many draws the constraints refused before. Keys in `given`
        have that value and are not drawn; with `keep` those draws are refused too that leave one of them out because
        its condition does not hold.

        Raises UserError if they refuse `MAX_RETRIES` draws: how many each of them refused.
        """
        given = given or {}
        refused: Counter[str] = Counter()
        # Where nothing is drawn every other try is the same.
        may_differ = any(each.key not in given and each.kind is not Kind.fixed for each in self.dimensions)
        tries = MAX_RETRIES if may_differ else 1
        for retry in range(tries):
            values = self.active({each.key: self._value(each, seed, number, retry, given) for each in self.dimensions})
            broken = [self.constraints[place] for place in self._broken(values)]
            if keep:
                broken += [f"{key} when {self._by_key[key].when}" for key in given if key not in values]
            if not broken:
                return values, retry
            refused.update(broken)
        shares = ", ".join(f"`{text}` refused {count}" for text, count in refused.items())
        where = f" with {_shown(given)}" if given else ""
        raise UserError(
            f"No configuration{where} meets all constraints: of {tries} draws {shares}. "
            f"Widen the space or relax {CONSTRAINTS_KEY}."
        )

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the grid's keys, the last key fastest; [{}] where there is no grid.

        Combinations that differ only in keys whose condition does not hold are one, and those that the constraints
        refuse whatever is drawn are left out.
        """
        return [copy.deepcopy(point) for point in self._grid]

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `values` whose key is searched and whose condition holds, in the order of the dimensions."""
        keys = (each.key for each in self.dimensions)
        return {key: values[key] for key in keys if key in values and self._is_active(key, values)}

    def contains(self, values: Mapping[str, Any]) -> str:
        """Why `values` are no configuration of this space; "" if they are one."""
        for key in values:
            if key not in self._by_key:
                near = did_you_mean(key, self._by_key)
                return f"{key} is not searched." + (f" {near}" if near else "")
        active = self.active(values)
        for each in self.dimensions:
            if each.key not in values:
                if self._is_active(each.key, values):
                    return f"{each.key} is missing."
                continue
            if each.key not in active:
                return f"{each.key} has a value, but is searched only when {each.when}."
            why = each.why_not(values[each.key])
            if why:
                return f"{_shown({each.key: values[each.key]})} {why}"
        broken = self._broken(values)
        return f"{self.constraints[broken[0]]} does not hold." if broken else ""

    def check_point(self, key: str, point: Mapping[str, Any]) -> None:
        """Raises ConfigError, naming `key`, if a configuration that the user gives, in full or in part, is not in this
        space."""
        for name, value in point.items():
            if name not in self._by_key:
                near = did_you_mean(name, self._by_key) or f"Searched are {', '.join(self._by_key)}."
                refuse(f"{key}.{name}", value, "is not searched.", near)
            why = self._by_key[name].why_not(value)
            if why:
                refuse(f"{key}.{name}", value, why)
        for name in point:
            if self._is_certain(name, point.keys()) and not self._is_active(name, point):
                why = f"has a value, but is searched only when {self._by_key[name].when}."
                refuse(f"{key}.{name}", point[name], why, "Leave it out.")
        try:
            self.drawn(0, 0, point, keep=True)
        except UserError as error:
            refuse(key, dict(point), f"{error}")

    def check(self) -> None:
        """Raises UserError if the constraints refuse `MAX_RETRIES` draws: nothing could ever be tried."""
        self.drawn(0, 0)

    def to_json(self) -> dict[str, Any]:
        """Lists of pairs, because jsonb forgets the order of a mapping's keys; values as text of the grammar, because
        JSON has no infinity."""
        return {
            "dimensions": [[each.key, each.text] for each in self.dimensions],
            "constraints": list(self.constraints),
            "configured": [[key, literal(value)] for key, value in self.configured.items()],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Space:
        configured = {key: read_literal(key, text) for key, text in stored["configured"]}
        return cls(
            dimensions=tuple(dimension(key, text) for key, text in stored["dimensions"]),
            constraints=tuple(stored["constraints"]),
            configured=configured,
        )

    # -- inside ----------------------------------------------------------------------------------------------

    @cached_property
    def _by_key(self) -> dict[str, Dimension]:
        return {each.key: each for each in self.dimensions}

    @cached_property
    def _constraints(self) -> tuple[Constraint, ...]:
        return tuple(map(Constraint, self.constraints))

    @cached_property
    def _grid(self) -> list[dict[str, Any]]:
        axes = [each for each in self.dimensions if each.is_grid]
        size = math.prod(len(each.items) for each in axes)
        if size > MAX_GRID:
            keys = ", ".join(each.key for each in axes)
            raise ConfigError(keys, None, f"the grid has {size} combinations, more than {MAX_GRID}.", "Use choice(…).")
        known = {each.key: each.items[0] for each in self.dimensions if each.kind is Kind.fixed}
        names = {*known, *(each.key for each in axes)}
        conditional = [each for each in axes if each.when is not None and self._is_certain(each.key, names)]
        readable = [each for each in self._constraints if all(self._is_readable(key, names) for key in each.keys)]
        found: dict[str, dict[str, Any]] = {}
        for items in itertools.product(*(each.items for each in axes)):
            point = dict(zip((each.key for each in axes), items, strict=True))
            values = {**known, **point}
            for each in conditional:
                if not self._is_active(each.key, values):
                    del point[each.key]
            if readable:
                present = {**self.configured, **self.active(values)}
                if not all(constraint.holds(present) for constraint in readable):
                    continue
            found.setdefault(token(point) if conditional else str(len(found)), point)
        return list(found.values())

    def _is_readable(self, key: str, names: Iterable[str]) -> bool:
        """Whether its value follows from those of `names` alone."""
        if key not in self._by_key:
            return True
        return key in names and self._is_certain(key, names)

    def _is_certain(self, key: str, names: Iterable[str]) -> bool:
        """Whether the values of `names` alone say if `key` is searched in a trial."""
        when = self._by_key[key].when
        return when is None or (when.key in names and self._is_certain(when.key, names))

    def _is_active(self, key: str, values: Mapping[str, Any]) -> bool:
        when = self._by_key[key].when
        if when is None:
            return True
        if when.key in values and self._is_active(when.key, values):
            return when.holds(values[when.key])
        return when.key in self.configured and when.holds(self.configured[when.key])

    def _broken(self, values: Mapping[str, Any]) -> list[int]:
        present = {**self.configured, **values}
        return [place for place, constraint in enumerate(self._constraints) if not constraint.holds(present)]

    def _value(self, each: Dimension, seed: int, number: int, retry: int, given: Mapping[str, Any]) -> Any:
        if each.key in given:
            return copy.deepcopy(given[each.key])
        return each.value(random.Random(derive(seed, "suggest", number, retry, each.key)).random())

    def _check_conditions(self) -> None:
        for each in self.dimensions:
            if each.when is None:
                continue
            if each.when.key == each.key:
                refuse(each.key, each.text, "its condition is about itself.")
            if each.when.key not in self._by_key:
                near = nearest(each.when.key, [key for key in self._by_key if key != each.key])
                hint = f"Did you mean {near}?" if near else f"Search it too, or search {each.key} without a condition."
                refuse(each.key, each.text, f"its condition is about {each.when.key}: not searched.", hint)
        for each in self.dimensions:
            self._check_circle(each)
        for each in self.dimensions:
            if each.when is not None:
                self._check_possible(each, each.when)

    def _check_circle(self, begin: Dimension) -> None:
        path, each = [begin.key], begin
        while each.when is not None:
            each = self._by_key[each.when.key]
            path.append(each.key)
            if each.key == begin.key:
                refuse(begin.key, begin.text, f"the conditions form a circle: {' → '.join(path)}.")
            if path.count(each.key) > 1:
                return  # a circle that does not pass here; it is told at one of its own keys

    def _check_possible(self, each: Dimension, when: Condition) -> None:
        other = self._by_key[when.key]
        for value in when.value if when.operator == "in" else [when.value]:
            why = other.why_not(value)
            if why:
                refuse(each.key, each.text, f"its condition is about what {other.key} never is: it {why}")


def space(
    given: Mapping[str, Any], constraints: Sequence[str] = (), *, configured: Mapping[str, Any] | None = None
) -> Space:
    """The space that `sweep.space` and `sweep.constraints` describe, checked as far as it can be without composing.

    Example: space({"optim.lr": "loguniform(1e-4, 1e-1)", "batch": "16,32"}, ["optim.lr * batch <= 1"]). Raises
    ConfigError or UserError as `dimension`, `Space` and `Space.check` do.
    """
    found = Space(
        dimensions=tuple(dimension(key, value) for key, value in given.items()),
        constraints=tuple(constraints),
        configured=dict(configured or {}),
    )
    found.check()
    return found


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={literal(redact_value(key, value))}" for key, value in given.items())
