"""From the command line of `orc sweep` to the configuration that trials are made of, and the space they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.composition import Searched, Template, draft
from orchestrator.config.identity import flatten
from orchestrator.config.redaction import redact_value
from orchestrator.config.settings import Lanes, SweepConfig
from orchestrator.config.typed import dump
from orchestrator.errors import ConfigError
from orchestrator.sweeps.constraints import KEY as CONSTRAINTS_KEY
from orchestrator.sweeps.constraints import Constraint
from orchestrator.sweeps.grammar import DOMAINS, WHEN
from orchestrator.sweeps.space import Dimension, Space, dimension, searched, space

__all__ = ["Template", "is_searched", "template"]

_SPACE = "sweep.space."
_SAME_FOR_ALL = {
    "train": "the train function is one for all trials of a sweep.",
    "experiment": "an experiment says which function is trained: that is one for all trials.",
    "preset": "a preset says where and how a run is kept, too: that is one for all trials.",
    "environment": "where a sweep runs is one for all trials.",
    "tensorboard": "where a run is shown is one for all trials.",
}
_MOST_TEXTS = 100
"""Of so many listed texts, lists and mappings of a key it is tried beforehand whether they fit."""


def template(
    overrides: Sequence[str],
    *,
    config_dir: Path | None = None,
    base: Mapping[str, Any] | None = None,
    keeps_sweep: bool = False,
) -> tuple[Template, Space]:
    """What a sweep with these overrides tries: `Template.job(space.draw(seed, number))` is a trial's configuration.

    An override is the sweep's if its value is a domain or a comma list (`is_searched`), or if its key begins with
    `sweep.space.`; it comes before what files say of the same key. `base` is a stored configuration, as for `compose`;
    with `keeps_sweep` its `sweep` section is taken over: that sweep goes on. `Template.base` has the whole space in
    `sweep.space`.

    Raises ConfigError, naming key and value: unknown keys with the nearest, values of the wrong type, keys that cannot
    be searched, a condition whose other side has no value. UserError where constraints leave nothing.
    """
    plain, asked = _taken_apart(overrides)
    for key in asked:
        _refuse_what_is_shared(dimension(key, asked[key].domain))
    unfinished = draft(plain, config_dir=config_dir, base=base, keeps_sweep=keeps_sweep)
    given = {key: _Asked(domain=domain, line=f"{key}={domain}") for key, domain in _by_key(unfinished.space).items()}
    given |= asked
    dimensions = {key: dimension(key, each.domain) for key, each in given.items()}
    for each in dimensions.values():
        _refuse_what_is_shared(each)
    made = unfinished.template(
        [_searched(dimensions[key], each) for key, each in given.items()],
        {key: each.text for key, each in dimensions.items()},
    )
    sweep = made.base.settings.sweep
    if not dimensions and sweep.seeds == 1:
        hint = "Example: orc sweep optim.lr=loguniform(1e-4,1e-1) sweep.samples=20"
        raise ConfigError("sweep.space", None, "nothing is searched.", hint)
    for each in dimensions.values():
        _refuse_without_room(each, sweep, made)
    found = space(
        {key: each.text for key, each in dimensions.items()},
        sweep.constraints,
        configured=_configured(made, dimensions, sweep.constraints),
    )
    for each in dimensions.values():
        for value in _probes(each):
            made.job({each.key: value})
    return made, found


def is_searched(override: str) -> bool:
    """Whether an override of `orc sweep` searches its key rather than setting it. Raises ConfigError for one that looks
    as if it did, and cannot."""
    return bool(_taken_apart([override])[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What somebody wrote for a searched key."""

    domain: Any
    line: str
    is_added: bool = False


def _taken_apart(overrides: Sequence[str]) -> tuple[list[str], dict[str, _Asked]]:
    """The overrides that set values, and those that search."""
    plain: list[str] = []
    asked: dict[str, _Asked] = {}
    for line in overrides:
        written, equals, text = line.partition("=")
        key = written.strip().lstrip("+")
        is_added = written.strip().startswith("+")
        if not equals or key.startswith("~"):
            plain.append(line)
            continue
        if key.startswith(_SPACE):
            key = key.removeprefix(_SPACE)
            asked.pop(key, None)
            asked[key] = _Asked(domain=text, line=f"{key}={text}", is_added=is_added)
        elif searched(key, text) is not None:
            asked.pop(key, None)
            asked[key] = _Asked(domain=text, line=line, is_added=is_added)
        else:
            plain.append(line)
    return plain, asked


def _by_key(given: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> domain. `{optim: {lr: "uniform(0,1)"}}` is the same as `{optim.lr: "uniform(0,1)"}`."""
    found: dict[str, Any] = {}
    for name, domain in given.items():
        key = f"{above}{name}"
        is_nested = isinstance(domain, Mapping) and domain and not set(domain) & {*DOMAINS, WHEN}
        found |= _by_key(domain, f"{key}.") if is_nested else {key: domain}
    return found


def _searched(each: Dimension, asked: _Asked) -> Searched:
    items = each.items if each.is_listed else ()
    return Searched(key=each.key, example=each.middle(), items=items, is_added=asked.is_added, line=asked.line)


def _refuse_what_is_shared(each: Dimension) -> None:
    why = _SAME_FOR_ALL.get(each.key.partition(".")[0])
    if why:
        raise ConfigError(each.key, each.words, f"cannot be searched: {why}", "Give it one value.")


def _refuse_without_room(each: Dimension, sweep: SweepConfig, made: Template) -> None:
    if each.key.partition(".")[0] == "resources" and sweep.lanes is not Lanes.off:
        why = "can be searched only with new workers for every trial: those of a lane are all alike."
        raise ConfigError(each.key, each.words, why, "Add sweep.lanes=off.")
    if each.when is not None and each.key in made.examples:
        why = f"is searched only when {each.when}, and has no value otherwise."
        raise ConfigError(each.key, redact_value(each.key, each.words), why, f"Give it one besides: {each.key}=VALUE")


def _configured(made: Template, dimensions: Mapping[str, Dimension], constraints: Sequence[str]) -> dict[str, Any]:
    """The values of keys that conditions and constraints read where a trial has none of its own."""
    known = flatten({**dump(made.base.settings), **made.base.user})
    read = [key for each in dimensions.values() if each.when is not None for key in [each.when.key]]
    for text in constraints:
        constraint = Constraint(text)
        constraint.check_keys({*known, *dimensions})
        read += constraint.keys
        for key in constraint.keys:
            if key not in dimensions and _follows(made.raw(key), dimensions):
                why = f"reads {key}, which follows a searched key: it is computed for each trial only later."
                raise ConfigError(CONSTRAINTS_KEY, text, why, "Write the searched key instead.")
    always = {key for key, each in dimensions.items() if each.when is None}
    return {key: known[key] for key in dict.fromkeys(read) if key in known and key not in always}


def _follows(raw: Any, dimensions: Mapping[str, Dimension]) -> bool:
    return isinstance(raw, str) and "${" in raw and any(key in raw for key in dimensions)


def _probes(each: Dimension) -> list[Any]:
    """The values that speak for all others: numbers of one kind are alike, texts are not."""
    found = each.probes()
    numbers = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
    others = [value for value in found if isinstance(value, bool) or not isinstance(value, int | float)]
    ends: list[Any] = []
    for kind in (int, float):
        alike = [number for number in numbers if type(number) is kind]
        ends += [min(alike), max(alike)] if alike else []
    return [*ends, *others[:_MOST_TEXTS]]
