"""Finding the train function, and what it says about its configuration."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.names import did_you_mean, nearest
from orchestrator.errors import ConfigError

_KEY = "train"
_SPELLING = "Write module:function, for example train=my_project.digits:train."


def load_function(reference: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises ConfigError with the key `train`.

    The working directory is put on `sys.path` and stays there: the function may import its neighbours later.
    """
    module_name, colon, name = reference.strip().partition(":")
    if not colon or not module_name or not name:
        raise ConfigError(_KEY, reference, "does not name a function.", _spelling(reference))
    if module_name.endswith(".py") or not all(
        part.isidentifier() for part in (*module_name.split("."), *name.split("."))
    ):
        raise ConfigError(_KEY, reference, "does not name a function.", _spelling(reference))
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    found: Any = _module(reference, module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                _KEY, reference, f"{module_name} has no function {name}.", _nearest_function(found, module_name, name)
            )
        found = getattr(found, part)
    if not callable(found) or inspect.isclass(found):
        why = f"{name} in {module_name} is {_article(type(found).__name__)}, not a function."
        raise ConfigError(_KEY, reference, why, _nearest_function(sys.modules[module_name], module_name, name))
    _check_signature(reference, found)
    return found


def load_failure_function(reference: str) -> Callable[..., Any]:
    """The function that `failures.function` names, see failures/function.py. Raises ConfigError."""
    key, called_with = "failures.function", ("failure", "decision")
    module, _, name = reference.strip().partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(key, reference, "does not name a function.", f"Write {key}=module:function.")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = _module(reference, module)
    except ConfigError as error:
        raise ConfigError(key, reference, error.why, f"Write {key}=module:function.") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
        inspect.signature(found).bind(*called_with)
    except AttributeError as error:
        raise ConfigError(key, reference, f"{module} has no function {name}.") from error
    except (TypeError, ValueError) as error:
        why = f"it is called as {name}({', '.join(called_with)}), which does not fit: {error}."
        raise ConfigError(key, reference, why) from error
    return found


def load_class(key: str, value: str, reference: str) -> Any:
    """What `module:Class` names, where the key's value says so. Raises ConfigError."""
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module before the colon
        raise ConfigError(key, value, f"cannot be imported: {error}.") from error


def config_schema(function: Callable[..., Any]) -> type | None:
    """The dataclass that the function's second parameter is annotated with; None if it takes any configuration."""
    parameters = _parameters(function)
    if len(parameters) < 2 or parameters[1].annotation is inspect.Parameter.empty:
        return None
    annotation = _resolved(function, parameters[1])
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    kind = typing.get_origin(annotation) or annotation
    if annotation in (Any, object, None) or not isinstance(kind, type) or isinstance(annotation, typing.TypeVar):
        return None
    if (
        issubclass(kind, Mapping | types.SimpleNamespace)
        or kind.__name__ in ("DictConfig", "Namespace")
        or _is_protocol(kind)
    ):
        return None
    why = f"its parameter {parameters[1].name} is annotated with {kind.__name__}, which is no dataclass."
    raise ConfigError(
        _KEY, _reference(function), why, "Make it a dataclass, or leave the annotation away to get a read-only mapping."
    )


def _module(reference: str, name: str) -> types.ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                _KEY, reference, f"there is no module {error.name} here.", _nearest_module(reference, error.name)
            ) from error
        raise _import_failed(reference, name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(reference, name, error) from error


def _import_failed(reference: str, name: str, error: BaseException) -> ConfigError:
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
        said = error.msg
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
        own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        said = str(error)
    why = f"importing {name} failed with {type(error).__name__}: {said}{where}."
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(_KEY, reference, why, f"Install what provides {error.name}.")
    return ConfigError(_KEY, reference, why, f"`python -c 'import {name}'` shows the same.")


def _nearest_module(reference: str, missing: str) -> str:
    """A hint with a module that exists where `missing` does not."""
    parent, _, last = missing.rpartition(".")
    paths = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else [os.getcwd()]
    if parent and not paths:
        return f"{parent} is a module, not a package: {parent}:FUNCTION names a function in it."
    known = [module.name for module in pkgutil.iter_modules(paths)]
    known += [
        entry.name for path in paths if Path(path).is_dir() for entry in Path(path).iterdir() if _is_namespace(entry)
    ]
    near = nearest(last, known)
    if near:
        return f"Did you mean {reference.strip().replace(missing, f'{parent}.{near}' if parent else near, 1)}?"
    if parent:
        return f"{parent} has: {', '.join(sorted(known)[:8]) or 'no modules'}."
    return f"It is looked for in {os.getcwd()} and among the installed packages. {_SPELLING}"


def _is_namespace(entry: Path) -> bool:
    return entry.is_dir() and entry.name.isidentifier() and any(entry.glob("*.py"))


def _nearest_function(holder: Any, module_name: str, name: str) -> str:
    known = [key for key, value in vars(holder).items() if inspect.isfunction(value) and not key.startswith("_")]
    near = nearest(name, known, cutoff=0.4)
    if near:
        return f"Did you mean {module_name}:{near}?"
    own = [key for key in known if vars(holder)[key].__module__ == module_name]
    return f"Its functions: {', '.join(own[:8])}." if own else "It defines no functions."


def _spelling(reference: str) -> str:
    text = reference.strip().replace("/", ".").removeprefix(".").removesuffix(".py")
    module, _, name = text.replace(".py:", ":").rpartition("." if ":" not in text else ":")
    names = (*module.split("."), *name.split("."))
    return (
        f"Did you mean train={module}:{name}?"
        if module and name and all(n.isidentifier() for n in names)
        else _SPELLING
    )


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in signature.parameters.values() if parameter.kind in positional]


def _check_signature(reference: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C: only the call can tell
    try:
        signature.bind(object(), object())
    except TypeError as error:
        why = f"it is called as train(run, cfg), but is defined as {getattr(function, '__name__', 'train')}{signature}."
        raise ConfigError(_KEY, reference, why, "Give it the two parameters run and cfg.") from error


def _resolved(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation itself, also where it is written as a string."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    target = inspect.unwrap(function)
    if not inspect.isfunction(target) and not inspect.ismethod(target):
        target = type(target).__call__
    names = getattr(target, "__globals__", {})
    try:
        # Only this parameter: another one's annotation may name what is not there at run time.
        alone = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
        return typing.get_type_hints(alone, globalns=names)["it"]
    except Exception as error:
        why = f"the annotation {parameter.annotation!r} of its parameter {parameter.name} cannot be resolved: {error}."
        near = did_you_mean(parameter.annotation, [key for key, value in names.items() if isinstance(value, type)])
        hint = near or "Import that class at the top of the module, not under TYPE_CHECKING."
        raise ConfigError(_KEY, _reference(function), why, hint) from error


def _reference(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))
