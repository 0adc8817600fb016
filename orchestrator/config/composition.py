"""From the yaml groups, a stored configuration and the command line to a checked `Job`.

Priority, lowest first: defaults in settings.py, groups, experiment, presets, a stored base, groups named on the
command line, values on the command line. Hydra reads the files; the values of the command line are set here, because
only here is known which keys exist, and because the errors should be for people.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError

from orchestrator.config.functions import config_schema, load_failure_function, load_function
from orchestrator.config.identity import ABSENT, config_hash, flatten, json_number
from orchestrator.config.job import Job
from orchestrator.config.names import did_you_mean, lookalike, nearest
from orchestrator.config.redaction import HIDDEN, looks_secret, redact_text, redact_url, redact_value, url_passwords
from orchestrator.config.settings import NOT_INHERITED, OURS, RESERVED, Settings, SweepConfig
from orchestrator.config.storage import check_storage, storage_location
from orchestrator.config.typed import build, defaults, dump, is_mapping_type, schema_keys, unknown_key
from orchestrator.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
"""Our yaml groups."""

ROOT = "orc_root"
"""What Hydra calls the root configuration, conf/orc.yaml, when we compose it."""

_OUR_KEYS = schema_keys(Settings)
_LATER = ("sweep.", "stopping.", "alerts.")
"""Sections whose keys (samples, points, patience, target …) are good names for keys of a user's, too."""
_ENV = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([A-Za-z_]\w*)")
_PLACEHOLDER = re.compile(r"\$\{oc\.env:[A-Za-z_]\w*\}")

# With every key of ours in the tree, Hydra itself refuses unknown ones also in a user's own @hydra.main script. Plain
# values: the types are checked in one place, `build`. The root is here, too, because Hydra looks for it before it
# extends its search path with our directory; under another name than the file's, or Hydra would take the one for the
# other's schema.
ConfigStore.instance().store(name="orc_schema", node=dump(Settings()), provider="orchestrator")
ConfigStore.instance().store(name=ROOT, node=OmegaConf.load(CONF / "orc.yaml"), provider="orchestrator")


def compose(
    overrides: Sequence[str],
    *,
    config_dir: Path | None = None,
    base: Mapping[str, Any] | None = None,
    user_schema: type | None = None,
    needs_train: bool = True,
) -> Job:
    """The configuration that these overrides ask for, checked. Raises ConfigError.

    `config_dir` holds a user's own groups and experiments; a file there comes before one of ours with the same name.
    `base` is a stored configuration (`Job.resolved`) to start from. `user_schema` is the dataclass of the user's part;
    by default the one that the train function's `cfg` is annotated with. With `needs_train=False` (for commands that
    start no run) the train function may be missing and is not looked at. Leaves no Hydra state and no directory behind.
    """
    tree = _composed([_parsed(override) for override in overrides], config_dir, base, user_schema, needs_train)
    return _job(tree.config, tree.schema, tree.sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """A key that has another value in each trial. Example: Searched(key="optim.lr", example=0.003)."""

    key: str
    example: Any
    """A value for where nothing is configured."""
    items: Sequence[Any] = ()
    """All that it may be, if those are listed. Names of files, where the key is a group."""
    is_added: bool = False
    """Whether it was written as `+key=`."""
    line: str = ""
    """What was written, for messages."""


class Draft:
    """A configuration whose searched keys are not known yet, because it names some of them itself. See `draft`."""

    def __init__(self, parsed: Sequence[Override], config_dir: Path | None, base: Mapping[str, Any] | None) -> None:
        self._parsed, self._config_dir, self._base = list(parsed), config_dir, base
        self._tree = self._composed(())

    @property
    def space(self) -> Mapping[str, Any]:
        """`sweep.space` as it is written."""
        given = _unresolved(self._tree.config)["sweep"]
        found = given.get("space") if isinstance(given, dict) else None
        return found if isinstance(found, dict) else {}

    def template(self, searched: Sequence[Searched], space: Mapping[str, str]) -> Template:
        """`space` is what the base job shows as `sweep.space`. Raises ConfigError for a key that does not exist."""
        with _hydra(self._config_dir) as files:
            groups = {each.key: each for each in searched if each.items and files.is_group(self._choice(each))}
        for each in groups.values():
            for item in each.items:
                if not isinstance(item, str):
                    raise ConfigError(each.key, item, "there is no such choice: its choices are names of files.")
        begin = {key: str(each.items[0]) for key, each in groups.items() if each.is_added}
        values = [each for each in searched if each.key not in groups]

        def tree(choices: Mapping[str, str]) -> _Tree:
            chosen = {**begin, **choices}
            lines = [self._choice(groups[key], name) for key, name in chosen.items()]
            found = self._composed(lines) if lines else self._tree
            for each in values:
                found.open(each)
            _replace(found.config, "sweep.space", dict(space))
            return found

        return Template(tree, {key: tuple(map(str, each.items)) for key, each in groups.items()})

    def _choice(self, searched: Searched, name: str = "") -> Override:
        return _parsed(f"{'+' if searched.is_added else ''}{searched.key}={name or searched.items[0]}")

    def _composed(self, more: Sequence[Override]) -> _Tree:
        return _composed([*self._parsed, *more], self._config_dir, self._base, None, True, keeps_sweep=True)


def draft(
    overrides: Sequence[str],
    *,
    config_dir: Path | None = None,
    base: Mapping[str, Any] | None = None,
    keeps_sweep: bool = False,
) -> Draft:
    """What `compose` reads, up to where the searched keys must be known. `overrides` hold plain values only.

    With `keeps_sweep` the sweep goes on that `base` belongs to: its `sweep` section is taken over.
    """
    if base is not None and not keeps_sweep:
        base = {name: value for name, value in base.items() if name != "sweep"}
    return Draft([_parsed(override) for override in overrides], config_dir, base)


class Template:
    """A configuration with other values in each trial. Composed once; `job` takes a few milliseconds.

    Safe to use from several threads.
    """

    base: Job
    """With the configured values of the searched keys, and with an example where nothing is configured."""
    groups: Mapping[str, Sequence[str]]
    """The searched keys that choose files, with their choices."""

    def __init__(self, tree: Callable[[Mapping[str, str]], _Tree], groups: Mapping[str, Sequence[str]]) -> None:
        self._make, self.groups = tree, groups
        self._trees: dict[tuple[tuple[str, str], ...], _Tree] = {}
        self._lock = Lock()
        first = tree({})
        self.base = _job(first.config, first.schema, first.sources)
        self._trees[()] = first.for_trials()

    @property
    def examples(self) -> frozenset[str]:
        """The searched keys for which nothing is configured."""
        return frozenset(self._trees[()].examples)

    def raw(self, key: str) -> Any:
        """The base's value of a key as it is written, `${…}` included."""
        return _at(_unresolved(self._trees[()].config), key)

    def settle(self, sweep: SweepConfig) -> None:
        """Another `sweep` section for the base job, for what is found out only after composing."""
        settings = dataclasses.replace(self.base.settings, sweep=sweep)
        resolved = {**self.base.resolved, "sweep": _stored(dump(sweep), {}, {})}
        self.base = dataclasses.replace(self.base, settings=settings, resolved=resolved)

    def job(self, values: Mapping[str, Any]) -> Job:
        """The configuration of a trial: the same as of a single run with these values. Keys that are left out have the
        base's value. Raises ConfigError that names the key of a value that does not fit."""
        with self._lock:
            tree = self._chosen({key: str(values[key]) for key in self.groups if key in values})
            changed = {key: value for key, value in values.items() if key not in self.groups}
            for key, value in changed.items():
                if _at(tree.raw, key) is ABSENT:
                    raise ConfigError(key, redact_value(key, value), "is not searched.")
            if tree.is_plain and all(_is_plain(value) and not isinstance(value, dict) for value in changed.values()):
                raw = tree.raw
                for key, value in changed.items():
                    raw = _with(raw, key.split("."), value)
                return _checked(raw, raw, tree.schema, tree.sources, tree.ours)
            try:
                for key, value in changed.items():
                    _update(tree.config, key, value)
                return _job(tree.config, tree.schema, tree.sources, tree.ours)
            finally:
                for key in changed:
                    _replace(tree.config, key, copy.deepcopy(_at(tree.raw, key)))

    def _chosen(self, choices: Mapping[str, str]) -> _Tree:
        known = tuple(choices.items())
        if known not in self._trees:
            self._trees[known] = self._make(choices).for_trials()
        return self._trees[known]


@dataclass(kw_only=True)
class _Tree:
    """The configuration before it is looked up and checked."""

    config: DictConfig
    schema: type | None
    sources: list[str]
    is_declared: bool
    """Whether files or a stored configuration say which keys the user's part has."""
    raw: dict[str, Any] = field(default_factory=dict)
    """Of a tree that trials are made of: as it is written."""
    is_plain: bool = False
    """Whether that is already what it is when everything is looked up."""
    ours: list[_Ours] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    def open(self, searched: Searched) -> None:
        """Makes sure that the searched key has a value. Raises ConfigError if there can be no such key."""
        key = searched.key
        if _exists(self.config, key) and _at(_unresolved(self.config), key) != "???":
            return
        override = dataclasses.replace(
            _parsed(f"{'+' if searched.is_added else ''}{key}=null"),
            _value=searched.example,
            input_line=searched.line or f"{key}={searched.example}",
        )
        try:
            if _head(override) in OURS:
                _set_ours(self.config, override)
            else:
                _set_users(self.config, override, self.schema, is_declared=self.is_declared, lenient=False)
        except ConfigError as error:
            written = redact_value(key, searched.line.partition("=")[2] or searched.example)
            raise ConfigError(error.key, written, error.why, error.hint) from error
        self.examples.append(key)

    def for_trials(self) -> _Tree:
        """A trial is configured like a run that belongs to no sweep."""
        _replace(self.config, "sweep", dump(SweepConfig()))
        self.raw = _unresolved(self.config)
        self.is_plain = _is_plain(self.raw)
        return self


def _composed(
    parsed: Sequence[Override],
    config_dir: Path | None,
    base: Mapping[str, Any] | None,
    user_schema: type | None,
    needs_train: bool,
    *,
    keeps_sweep: bool = False,
) -> _Tree:
    with _hydra(config_dir) as files:
        groups = [override for override in parsed if files.is_group(override)]
        config, sources = files.load(groups)
        if base is not None:
            plain = files.load([])[0] if groups else config
            config = _inherited(base, plain, config, groups, keeps_sweep=keeps_sweep)
            sources.append("stored configuration")
    declared = _user_keys(config) if base is None else _user_keys(config) - set(flatten(base))
    values = [override for override in parsed if override not in groups]
    for override in values:
        if _head(override) in OURS:
            _set_ours(config, override)
    _spell_out_workers(config)
    schema = _schema(config, user_schema, needs_train)
    config = _with_defaults(config, schema)
    for override in values:
        if _head(override) not in OURS:
            _set_users(config, override, schema, is_declared=bool(declared), lenient=not needs_train)
    if base is not None:
        _refuse_lost_secrets(base, config)
    sources += [f"command line: {_shown(override)}" for override in parsed]
    return _Tree(config=config, schema=schema, sources=sources, is_declared=bool(declared))


def from_hydra(config: DictConfig, *, user_schema: type | None = None, needs_train: bool = True) -> Job:
    """The checked job of a configuration that a user's own `@hydra.main` script composed with ours in it.

    The script's root has `defaults: [orc, _self_]` and `hydra: {searchpath: ["pkg://orchestrator.conf"]}`, see
    conf/README.md.
    """
    own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
    OmegaConf.set_readonly(own, False)
    OmegaConf.set_struct(own, False)
    sources = ["a Hydra script"]
    if HydraConfig.initialized():
        sources += [f"{group}={choice}" for group, choice in _choices(HydraConfig.get().runtime.choices)]
        sources += [f"command line: {_shown(_parsed(line))}" for line in HydraConfig.get().overrides.task]
    schema = _schema(own, user_schema, needs_train)
    return _job(_with_defaults(own, schema), schema, sources)


# --- reading files --------------------------------------------------------------------------------------------------


class _Files:
    """The yaml files as one Hydra search path sees them."""

    def __init__(self, directories: Sequence[Path], search: Sequence[str]) -> None:
        self._directories = directories
        self._search = list(search)

    @property
    def _loader(self) -> ConfigLoader:
        hydra = GlobalHydra.instance()
        return hydra.config_loader()

    def is_group(self, override: Override) -> bool:
        """Whether it chooses a file (`resources=gpu`), rather than setting a value."""
        key = override.key_or_group
        if "." in key or isinstance(override.value(), dict) or key.split("/", 1)[0] not in self._top_groups:
            return False
        return bool(self._options(key))

    @cached_property
    def _top_groups(self) -> set[str]:
        found = set(ConfigStore.instance().list(""))
        for directory in self._directories:
            found |= {entry.name for entry in directory.iterdir() if entry.is_dir()}
        return found

    def _options(self, group: str) -> list[str]:
        return sorted(self._loader.get_group_options(group, config_name=ROOT, overrides=self._search))

    def load(self, groups: Sequence[Override]) -> tuple[DictConfig, list[str]]:
        """The tree without command-line values, and where it came from."""
        if groups or self._search:
            return self._read(groups)
        if not _PACKAGED:  # our own files do not change while we run
            _PACKAGED.append(self._read(groups))
        config, sources = _PACKAGED[0]
        return copy.deepcopy(config), list(sources)

    def _read(self, groups: Sequence[Override]) -> tuple[DictConfig, list[str]]:
        for override in groups:
            if not override.is_delete() and not isinstance(override.value(), str | list):
                choices = f"Choices: {', '.join(self._options(override.key_or_group))}."
                raise ConfigError(override.key_or_group, override.value(), "there is no such choice.", choices)
        lines = [str(override.input_line) for override in groups]
        try:
            config = hydra_compose(ROOT, [*lines, *self._search], return_hydra_config=True)
        except MissingConfigException as error:
            raise self._no_such_file(error, groups) from error
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file"
            raise ConfigError(where, None, f"is no yaml: {error.problem or error.context}.") from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise self._unreadable(error, groups) from error
        sources = ["defaults", *(f"{group}={choice}" for group, choice in _choices(config.hydra.runtime.choices))]
        own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
        OmegaConf.set_struct(own, False)
        return own, sources

    def _no_such_file(self, error: MissingConfigException, groups: Sequence[Override]) -> ConfigError:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        options = sorted(error.options or [])
        if not group:
            why = f"there is no file {name}.yaml on the search path."
            return ConfigError("defaults", error.missing_cfg_file, why, _where(error, groups))
        choices = f"Choices: {', '.join(options)}." if options else "There are none."
        near = nearest(name, options)
        hint = f"Did you mean {group}={near}? {choices}" if near else choices
        if not any(override.key_or_group == group for override in groups):
            hint += f" {_where(error, groups)}"
        elif not near:
            hint += " A directory of your own is added with --config-dir."
        return ConfigError(group, name, "there is no such choice.", hint)

    def _unreadable(self, error: Exception, groups: Sequence[Override]) -> ConfigError:
        text = str(error)
        for override in groups:
            if "No match in the defaults list" in text and override.key_or_group in text:
                hint = f"Add it: +{override.input_line}"
                return ConfigError(
                    override.key_or_group, override.value(), "is no group that is chosen by default.", hint
                )
        key = getattr(error, "full_key", "") or (groups[-1].key_or_group if groups else "configuration")
        return ConfigError(key, None, f"the configuration files cannot be put together: {_one_line(text)}.")


_PACKAGED: list[tuple[DictConfig, list[str]]] = []


@contextmanager
def _hydra(config_dir: Path | None) -> Iterator[_Files]:
    """Hydra's Compose API with our files, and with the user's before them; everything global is put back."""
    search: list[str] = []
    directory = CONF
    if config_dir is not None:
        directory = Path(config_dir).expanduser().resolve()
        if not directory.is_dir():
            parent = directory.parent
            near = did_you_mean(directory.name, [entry.name for entry in parent.iterdir()] if parent.is_dir() else [])
            raise ConfigError("--config-dir", str(config_dir), "there is no such directory.", near)
        search = ["hydra.searchpath=['pkg://orchestrator.conf']"]
    version, runtime, surrounding = VersionBase.instance(), JobRuntime.instance(), GlobalHydra.instance().hydra
    version_before, name_before = version.version_base, runtime.get("name")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory), job_name=ROOT, version_base="1.3"):
            yield _Files([directory, CONF], search)
    finally:
        GlobalHydra.instance().hydra = surrounding
        version.version_base = version_before
        runtime.set("name", name_before)


def _choices(choices: Mapping[Any, Any]) -> list[tuple[str, str]]:
    return [
        (str(group), str(choice)) for group, choice in choices.items() if choice and not str(group).startswith("hydra/")
    ]


def _where(error: MissingConfigException, groups: Sequence[Override]) -> str:
    """Who asked for a missing file; Hydra ascribes an `override` to the root, whoever wrote it."""
    found = re.search(r"In '([^']+)'", str(error))
    if found and found[1] != ROOT:
        return f"It is asked for in {found[1]}.yaml."
    asking = ", ".join(str(override.input_line) for override in groups)
    return f"It is asked for by {asking}." if asking else ""


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("See http")]
    return "; ".join(lines[:3]).rstrip(".")


# --- the command line -----------------------------------------------------------------------------------------------


def _parsed(line: str) -> Override:
    key, _, text = line.partition("=")
    key = key.lstrip("+~")
    if not text.isascii() and not set(text) & set("'\"\\[]{}$,"):
        line = f"{line.partition('=')[0]}='{text}'"  # Hydra's grammar takes letters beyond ASCII in quotes only
    try:
        override = OverridesParser.create().parse_overrides([line])[0]
    except OverrideParseException as error:
        if "=" not in line:
            near = did_you_mean(line, _OUR_KEYS)
            raise ConfigError(line, None, "is no override.", near or "Write KEY=VALUE.") from error
        function = re.search(r"Unknown function '(\w+)'", str(error))
        value = redact_value(key, line.partition("=")[2])
        if function:
            why = f"there is no function {function[1]} here; a run takes one value."
            hint = f"{_SEVERAL} To give that text as it is, quote it twice: {key}='\"…\"'."
            raise ConfigError(key, value, why, hint) from error
        why = "the override cannot be read: special characters such as , : [ ] { } ( ) = need quotes."
        raise ConfigError(key, value, why, f"Quote it twice, once for the shell: {key}='\"…\"'.") from error
    key = override.key_or_group
    if override.is_hydra_override() or key == "hydra":
        raise ConfigError(
            key,
            None,
            "keys of Hydra itself have no effect here.",
            "A directory of your own is added with --config-dir.",
        )
    if override.is_sweep_override():
        why = "is a list of alternatives; a run takes one value."
        hint = f"{_SEVERAL} Text with commas: {key}='\"a,b\"'. A list: {key}=[a,b]."
        raise ConfigError(key, redact_value(key, override.get_value_string()), why, hint)
    return override


_SEVERAL = "Several values are tried by orc sweep."


def _head(override: Override) -> str:
    return override.key_or_group.split(".", 1)[0]


def _shown(override: Override) -> str:
    line = str(override.input_line)
    key, equals, value = line.partition("=")
    return redact_url(line) if _PLACEHOLDER.fullmatch(value) or not looks_secret(key) else f"{key}{equals}{HIDDEN}"


def _set_ours(config: DictConfig, override: Override) -> None:
    key, value = override.key_or_group, override.value()
    parts = key.split(".")
    prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    if override.is_delete():
        if len(parts) > 2 and is_mapping_type(_OUR_KEYS.get(prefixes[1])) and OmegaConf.select(config, key) is not None:
            del OmegaConf.select(config, prefixes[-2])[parts[-1]]
            return
        raise ConfigError(
            key, None, "cannot be deleted: it is a key of ours with a default.", f"Set it instead: {key}=VALUE."
        )
    is_group = any(known.startswith(f"{key}.") for known in _OUR_KEYS)
    below_mapping = any(prefix in _OUR_KEYS and is_mapping_type(_OUR_KEYS[prefix]) for prefix in prefixes)
    if key not in _OUR_KEYS and not is_group and not below_mapping:
        raise unknown_key(key, value, list(_OUR_KEYS))
    if is_group and not isinstance(value, dict):
        known = ", ".join(name for name in _OUR_KEYS if name.startswith(f"{key}."))
        raise ConfigError(key, redact_value(key, value), "is a group of keys.", f"Set one of them: {known}.")
    if is_group and isinstance(value, dict):
        for name in value:
            if f"{key}.{name}" not in _OUR_KEYS:
                raise unknown_key(f"{key}.{name}", value[name], [k for k in _OUR_KEYS if k.startswith(f"{key}.")])
    _update(config, key, value)


def _spell_out_workers(config: DictConfig) -> None:
    """`resources.workers: {min: 1, max: 4}` is how an elastic run may be written; nobody else sees it so."""
    given = _unresolved(config).get("resources")
    span = given.get("workers") if isinstance(given, dict) else None
    if not isinstance(span, dict):
        return
    if set(span) != {"min", "max"}:
        why = "is neither a number nor a span from min to max."
        raise ConfigError("resources.workers", span, why, "Example: resources.workers={min: 1, max: 4}")
    _replace(config, "resources.workers", span["max"])
    _replace(config, "resources.min_workers", span["min"])


def _set_users(
    config: DictConfig, override: Override, schema: type | None, *, is_declared: bool, lenient: bool
) -> None:
    key, value = override.key_or_group, override.value()
    if _head(override) in RESERVED:
        raise ConfigError(
            key, redact_value(key, value), "this name is reserved.", "The experiment's name is run.experiment."
        )
    exists = _exists(config, key)
    if override.is_delete():
        if not exists:
            raise unknown_key(key, None, sorted(_user_keys(config)))
        parent, _, last = key.rpartition(".")
        with open_dict(config):
            del (OmegaConf.select(config, parent) if parent else config)[last]
        return
    if not (exists or override.is_add() or override.is_force_add()):
        _check_known(config, override, schema, is_declared=is_declared, lenient=lenient)
    _update(config, key, value)


def _check_known(
    config: DictConfig, override: Override, schema: type | None, *, is_declared: bool, lenient: bool
) -> None:
    """Refuse a key that nobody declared: always where there is a declaration, else only if it looks like a slip."""
    key, value = override.key_or_group, override.value()
    fields = schema_keys(schema) if schema is not None else {}
    if _in_schema(key, fields):
        return
    known = {*_user_keys(config), *fields}
    near = lookalike(key, known) or lookalike(key, [*_OUR_KEYS, *OURS])
    if not near and "." in key and lookalike(_head(override), OURS):
        near = nearest(key, _OUR_KEYS)
    if not near and "." not in key:
        near = next((name for name in _OUR_KEYS if name.endswith(f".{key}") and not name.startswith(_LATER)), "")
    shown = redact_value(key, value)
    way_out = "" if schema is not None else f" To add it all the same: +{override.input_line}"
    if near:
        raise ConfigError(key, shown, "there is no such key.", f"Did you mean {near}?{way_out}")
    if schema is not None:
        raise unknown_key(key, value, sorted(known))
    if is_declared and not lenient:
        hint = did_you_mean(key, known) or f"The train function's keys: {', '.join(sorted(known)[:12])}."
        raise ConfigError(key, shown, "there is no such key.", f"{hint}{way_out}")


def _in_schema(key: str, fields: Mapping[str, Any]) -> bool:
    parts = key.split(".")
    prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    below_mapping = any(prefix in fields and _may_hold_keys(fields[prefix]) for prefix in prefixes)
    return below_mapping or key in fields or any(name.startswith(f"{key}.") for name in fields)


def _may_hold_keys(hint: Any) -> bool:
    """A mapping, a list (`layers.0`), or a union, where `build` decides."""
    return is_mapping_type(hint) or not isinstance(hint, type)


def _user_keys(config: DictConfig) -> set[str]:
    return set(flatten({name: value for name, value in _unresolved(config).items() if name not in OURS}))


def _unresolved(config: DictConfig) -> dict[str, Any]:
    """The tree as it is written, `${…}` included."""
    raw = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(raw, dict)
    return {str(name): value for name, value in raw.items()}


def _exists(config: DictConfig, key: str) -> bool:
    return _at(_unresolved(config), key) is not ABSENT


def _at(raw: Any, key: str) -> Any:
    """What stands at a dotted key of plain values, ABSENT if there is no such key."""
    for part in key.split("."):
        if isinstance(raw, list) and part.isdigit() and int(part) < len(raw):
            raw = raw[int(part)]
        elif isinstance(raw, dict) and part in raw:
            raw = raw[part]
        else:
            return ABSENT
    return raw


def _with(raw: Any, parts: Sequence[str], value: Any) -> Any:
    """The plain values with another one at that key; what is not on the way there is shared."""
    if not parts:
        return value
    if isinstance(raw, list):
        place = int(parts[0])
        return [_with(item, parts[1:], value) if at == place else item for at, item in enumerate(raw)]
    return {**raw, parts[0]: _with(raw[parts[0]], parts[1:], value)}


def _is_plain(value: Any) -> bool:
    """Whether nothing in it has to be looked up or is missing."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return not isinstance(value, str) or ("${" not in value and value != "???")


def _replace(config: DictConfig, key: str, value: Any) -> None:
    """Puts the value there as it is, whatever there was."""
    OmegaConf.update(config, key, value, merge=False, force_add=True)


def _update(config: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(config, key, value, merge=isinstance(value, dict), force_add=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        why = f"does not fit: {_one_line(str(getattr(error, 'msg', None) or error).split('full_key')[0])}."
        raise ConfigError(key, redact_value(key, value), why) from error


# --- a stored configuration as base ---------------------------------------------------------------------------------


def _inherited(
    base: Mapping[str, Any],
    plain: DictConfig,
    chosen: DictConfig,
    groups: Sequence[Override],
    *,
    keeps_sweep: bool = False,
) -> DictConfig:
    """The defaults, over them the stored configuration, over that what the groups of the command line change."""
    config = OmegaConf.merge(plain, OmegaConf.create(_restored(base, keeps_sweep=keeps_sweep)))
    assert isinstance(config, DictConfig)
    was = flatten(_unresolved(plain))
    for key, value in flatten(_unresolved(chosen)).items():
        if key not in was or was[key] != value:
            _update(config, key, value)
    for override in groups:
        group = override.key_or_group.replace("/", ".")
        if isinstance(OmegaConf.select(chosen, group), DictConfig):
            OmegaConf.update(config, group, OmegaConf.select(chosen, group), merge=False, force_add=True)
    return config


def _restored(base: Mapping[str, Any], *, keeps_sweep: bool) -> dict[str, Any]:
    """The part of a stored configuration that another run takes over. Keys of ours that no longer exist are dropped."""
    kept: dict[str, Any] = {}
    for name, value in base.items():
        if (
            name in RESERVED
            or (name in NOT_INHERITED and not (keeps_sweep and name == "sweep"))
            or (name in OURS and name not in _sections() and name not in _OUR_KEYS)
        ):
            continue
        if name in _sections() and isinstance(value, Mapping):
            value = _taken_over(str(name), value)
        kept[str(name)] = value
    restored = _without_hidden(kept)
    assert isinstance(restored, dict)
    return restored


def _taken_over(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What another run takes of a section of ours, sections within it included."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{section}.{name}"
        if key in NOT_INHERITED:
            continue
        if key in _OUR_KEYS:
            kept[name] = value
        elif isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in _OUR_KEYS):
            kept[name] = _taken_over(key, value)
    return kept


def _sections() -> set[str]:
    return {key.split(".", 1)[0] for key in _OUR_KEYS if "." in key}


def _without_hidden(value: Any) -> Any:
    """Stored text as it has to be read again: `${oc.env:NAME}` is looked up, other `${` is text, `.inf` is a number."""
    if isinstance(value, Mapping):
        return {str(name): _without_hidden(item) for name, item in value.items() if not _is_hidden(item)}
    if isinstance(value, list | tuple):
        return [_without_hidden(item) for item in value]
    if value in (".inf", "-.inf", ".nan") and isinstance(value, str):
        return float(value.replace(".", ""))
    return re.sub(r"\$\{(?!oc\.env:[A-Za-z_]\w*\})", r"\\${", value) if isinstance(value, str) else value


def _is_hidden(value: Any) -> bool:
    return isinstance(value, str) and (value == HIDDEN or f":{HIDDEN}@" in value)


def _refuse_lost_secrets(base: Mapping[str, Any], config: DictConfig) -> None:
    for key, value in flatten({name: value for name, value in base.items() if name not in OURS}).items():
        if _is_hidden(value) and not _exists(config, key):
            why = "is a secret, and a stored configuration holds no secrets."
            raise ConfigError(key, None, why, f"Give it again: +{key}='${{oc.env:NAME}}'.")


# --- checking -------------------------------------------------------------------------------------------------------


def _schema(config: DictConfig, user_schema: type | None, needs_train: bool) -> type | None:
    """The dataclass of the user's part. This is where the train function is imported."""
    if not needs_train:
        return user_schema
    try:
        train = OmegaConf.select(config, "train")
    except OmegaConfBaseException:
        train = _resolved(config)["train"]  # says what is wrong
    if not train:
        hint = "Give it: train=module:function, or choose an experiment that has one: experiment=digits."
        raise ConfigError("train", None, "no train function is named.", hint)
    if not isinstance(train, str):
        raise ConfigError("train", train, "does not name a function.", "Write train=module:function.")
    function = load_function(train)
    asked = config.get("failures", {}).get("function")
    if isinstance(asked, str) and asked:
        load_failure_function(asked)
    return user_schema or config_schema(function)


def _with_defaults(config: DictConfig, schema: type | None) -> DictConfig:
    """The schema's defaults below what the files say, so that `${…}` and `layers.0=8` find them."""
    if schema is None:
        return config
    merged = OmegaConf.merge(OmegaConf.create(defaults(schema)), config)
    assert isinstance(merged, DictConfig)
    return merged


def _job(config: DictConfig, schema: type | None, sources: list[str], known: list[_Ours] | None = None) -> Job:
    for name in config:
        if name in RESERVED:
            why = f"the file that was chosen puts its keys below {name}."
            raise ConfigError(str(name), None, why, "Its first line must be: # @package _global_")
    return _checked(_unresolved(config), _resolved(config), schema, sources, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ours:
    """Our part of a configuration, checked: the same for most trials of a sweep."""

    values: Mapping[str, Any]
    settings: Settings
    plain: Mapping[str, Any]
    """The settings as plain values."""


def _checked(
    raw: Mapping[str, Any],
    values: Mapping[str, Any],
    schema: type | None,
    sources: Sequence[str],
    known: list[_Ours] | None = None,
) -> Job:
    """`raw` is what is written, `values` has every `${…}` looked up. `known` keeps our part for the next call."""
    ours = _our_part(values, known if known is not None else [])
    settings = copy.deepcopy(ours.settings)
    user = {name: value for name, value in values.items() if name not in OURS}
    user = dump(build(schema, user)) if schema is not None else dump(user)
    environment = _environment_secrets(raw)
    everything = {**ours.plain, **user}
    resolved = _stored(everything, raw, environment)
    rules = resolved["alerts"]["rules"]  # they name notifiers, no addresses
    resolved["alerts"] = {**_without_addresses(resolved["alerts"]), "rules": rules}
    resolved["notify"] = _without_addresses(resolved["notify"])
    hidden = _hidden_values(everything, resolved)
    hidden |= _addresses([everything["notify"], {**everything["alerts"], "rules": {}}])
    resolved = _without_copies(resolved, hidden)
    secrets = {*environment, *hidden}
    secrets |= {
        password for leaf in flatten(everything).values() if isinstance(leaf, str) for password in url_passwords(leaf)
    }
    return Job(
        train=settings.train,
        hash=config_hash(resolved),
        settings=settings,
        user=user,
        resolved=resolved,
        sources=[redact_text(source, secrets) for source in sources],
        secrets=tuple(sorted(secrets)),
    )


def _our_part(values: Mapping[str, Any], known: list[_Ours]) -> _Ours:
    mine = {name: value for name, value in values.items() if name in OURS}
    for each in known:
        if each.values == mine:
            return each
    settings = build(Settings, mine)
    check_storage(settings.storage.url)
    settings.storage.url = storage_location(settings.storage.url)
    found = _Ours(values=copy.deepcopy(mine), settings=settings, plain=dump(settings))
    known[:] = [found]
    return found


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Plain values with every `${…}` looked up."""
    try:
        found = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise ConfigError(key, None, "has no value yet.", f"Give it: {key}=VALUE.") from error
    except InterpolationKeyError as error:
        key = str(error.full_key)
        asked = re.search(r"Interpolation key '([^']+)'", str(error))
        near = did_you_mean(asked[1], [*_OUR_KEYS, *_user_keys(config)]) if asked else ""
        raise ConfigError(
            key, _raw(config, key), f"refers to {asked[1] if asked else 'a key'}, which does not exist.", near
        ) from error
    except InterpolationResolutionError as error:
        key = str(error.full_key)
        raw = _raw(config, key)
        missing = next((name for name in _ENV.findall(str(raw)) if name not in os.environ), "")
        if missing:
            hint = f"Set it: export {missing}=…, or give the key a value: {key}=VALUE."
            raise ConfigError(key, raw, f"the environment variable {missing} is not set.", hint) from error
        raise ConfigError(key, raw, f"cannot be looked up: {_one_line(str(error).split('full_key')[0])}.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(
            str(error.full_key or "configuration"), None, f"{_one_line(str(error).split('full_key')[0])}."
        ) from error
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def _raw(config: DictConfig, key: str) -> Any:
    value: Any = _unresolved(config)
    for part in re.findall(r"[^.\[\]]+", key):
        value = value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, dict) else None
    return redact_value(key, value)


def _environment_secrets(raw: Mapping[str, Any]) -> dict[str, str]:
    """Value -> name, of every environment variable that the configuration reads and that looks secret."""
    names = {name for leaf in _texts(raw) for name in _ENV.findall(leaf) if looks_secret(name)}
    return {os.environ[name]: name for name in sorted(names) if os.environ.get(name)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _stored(value: Any, raw: Any, environment: Mapping[str, str], key: str = "") -> Any:
    """The value as it may be stored: secrets of the environment by name, other secrets hidden, strict JSON."""
    if isinstance(value, Mapping):
        below = raw if isinstance(raw, Mapping) else {}
        return {
            str(name): redact_value(str(name), _stored(item, below.get(name), environment, str(name)))
            for name, item in value.items()
        }
    if isinstance(value, list):
        below_items = raw if isinstance(raw, list) else []
        return [_stored(item, dict(enumerate(below_items)).get(index), environment) for index, item in enumerate(value)]
    name = _ENV.match(raw) if isinstance(raw, str) else None
    if name and looks_secret(name[1]) and os.environ.get(name[1]) == str(value):
        return f"${{oc.env:{name[1]}}}"
    if isinstance(value, str):
        for secret in sorted(environment, key=len, reverse=True):
            value = value.replace(secret, f"${{oc.env:{environment[secret]}}}") if len(secret) >= 4 else value
    return json_number(value) if isinstance(value, float) else value


def _without_copies(value: Any, hidden: set[str]) -> Any:
    """Hidden values are hidden wherever else they stand, too (`copy: ${login.password}`)."""
    if isinstance(value, Mapping):
        return {name: _without_copies(item, hidden) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_copies(item, hidden) for item in value]
    return redact_text(value, hidden) if isinstance(value, str) and hidden else value


def _without_addresses(value: Any) -> Any:
    """Whoever knows the URL of a webhook may post to it."""
    if isinstance(value, Mapping):
        return {name: _without_addresses(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_addresses(item) for item in value]
    return HIDDEN if _is_address(value) else value


def _addresses(value: Any) -> set[str]:
    return {text for text in _texts(value) if _is_address(text)}


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and "://" in value and value not in _PUBLIC_ADDRESSES


_PUBLIC_ADDRESSES = frozenset({Settings().alerts.pagerduty.url})


def _hidden_values(values: Mapping[str, Any], stored: Mapping[str, Any]) -> set[str]:
    """What stands behind `***`."""
    shown = flatten(stored)
    return {str(value) for key, value in flatten(values).items() if shown.get(key) == HIDDEN}
