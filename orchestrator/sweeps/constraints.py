"""Conditions between keys that a configuration must meet: `optim.lr * batch_size <= 1`.

Python's syntax for numbers, text in quotes, lists, comparisons, `and`, `or`, `not`, and a few functions. Nothing else
is read, and nothing is executed.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from orchestrator.config.names import did_you_mean
from orchestrator.config.redaction import redact_value
from orchestrator.errors import ConfigError
from orchestrator.sweeps.grammar import dotted_name, parsed_python

KEY = "sweep.constraints"

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "log": math.log,
    "exp": math.exp,
    "sqrt": math.sqrt,
}
_VALUE = "value"
_WORDS = {"true": True, "false": False, "null": None}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    # On floats: whole numbers would grow without end.
    ast.Pow: lambda base, exponent: float(base) ** float(exponent),
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}


class Constraint:
    """One constraint. `keys` are those it compares; a key whose name is no Python name is written value("a.lambda").

    Raises ConfigError when made from a text that cannot be read or compares nothing.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._tree = parsed_python(KEY, text)
        keys: dict[str, None] = {}
        self._check(self._tree, keys)
        self.keys: tuple[str, ...] = tuple(keys)
        if not isinstance(self._tree, ast.Compare | ast.BoolOp) and not _is_not(self._tree):
            raise ConfigError(KEY, text, "compares nothing.", "Write a condition, such as optim.lr * batch_size <= 1.")
        if not keys:
            raise ConfigError(KEY, text, "names no key.", "Write a condition, such as optim.lr * batch_size <= 1.")

    def check_keys(self, known: Collection[str]) -> None:
        """Raises ConfigError if a key is none of `known`, the searched and the configured ones."""
        for key in self.keys:
            if key not in known:
                near = did_you_mean(key, known) or f'Text is quoted: "{key}".'
                raise ConfigError(KEY, self.text, f"{key} is neither searched nor configured.", near)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the configuration may be tried.

        Where a key has no value (its own condition does not hold and nothing is configured) there is nothing to
        compare: True. Where the arithmetic has no result (division by zero, overflow): False. Raises ConfigError if
        values cannot be compared at all, text with numbers.
        """
        if any(key not in values for key in self.keys):
            return True
        try:
            return bool(self._computed(self._tree, values))
        except (ArithmeticError, ValueError):
            return False
        except TypeError as error:
            given = ", ".join(f"{key}={redact_value(key, values[key])!r}" for key in self.keys)
            raise ConfigError(KEY, self.text, f"cannot be computed for {given}: {error}.") from error

    def _check(self, node: ast.AST, keys: dict[str, None]) -> None:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str()):
                return
            case ast.Name(id=name) if name in _WORDS:
                return
            case ast.Name() | ast.Attribute():
                name = dotted_name(node)
                if not name:
                    self._refuse(node)
                keys[name] = None
            case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(key))], keywords=[]) if name == _VALUE:
                keys[key] = None
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                if name not in _FUNCTIONS:
                    near = did_you_mean(name, _FUNCTIONS) or f"There are {', '.join(_FUNCTIONS)}."
                    raise ConfigError(KEY, self.text, f"there is no function {name} here.", near)
                for argument in node.args:
                    self._check(argument, keys)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                self._check(node.left, keys)
                self._check(node.right, keys)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not()):
                self._check(node.operand, keys)
            case ast.BoolOp():
                for value in node.values:
                    self._check(value, keys)
            case ast.Compare() if all(type(each) in _COMPARISONS for each in node.ops):
                for side in (node.left, *node.comparators):
                    self._check(side, keys)
            case ast.List() | ast.Tuple():
                for item in node.elts:
                    self._check(item, keys)
            case _:
                self._refuse(node)

    def _refuse(self, node: ast.AST) -> NoReturn:
        part = ast.get_source_segment(self.text.strip(), node)
        why = f"`{part}` is nothing that a constraint can compute."
        raise ConfigError(KEY, self.text, why, "It takes keys, numbers, quoted text, + - * / // % **, and comparisons.")

    def _computed(self, node: ast.AST, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name(id=name) if name in _WORDS:
                return _WORDS[name]
            case ast.Name() | ast.Attribute():
                return values[dotted_name(node)]
            case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(key))]) if name == _VALUE:
                return values[key]
            case ast.Call(func=ast.Name(id=name)):
                return _FUNCTIONS[name](*(self._computed(argument, values) for argument in node.args))
            case ast.BinOp():
                left, right = self._computed(node.left, values), self._computed(node.right, values)
                return _real(_ARITHMETIC[type(node.op)](_number(left), _number(right)))
            case ast.UnaryOp(op=ast.Not()):
                return not self._computed(node.operand, values)
            case ast.UnaryOp():
                value = _number(self._computed(node.operand, values))
                return -value if isinstance(node.op, ast.USub) else value
            case ast.BoolOp(op=ast.And()):
                return all(self._computed(value, values) for value in node.values)
            case ast.BoolOp():
                return any(self._computed(value, values) for value in node.values)
            case ast.Compare():
                left = self._computed(node.left, values)
                for each, side in zip(node.ops, node.comparators, strict=True):
                    right = self._computed(side, values)
                    if not _COMPARISONS[type(each)](left, right):
                        return False
                    left = right
                return True
            case ast.List() | ast.Tuple():
                return [self._computed(item, values) for item in node.elts]
        raise AssertionError(node)


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _number(value: Any) -> int | float:
    """Text times a number would be longer text, and a list plus a list a longer list."""
    if not isinstance(value, int | float):
        raise TypeError(f"a {type(value).__name__} is no number")
    return value


def _real(value: Any) -> Any:
    if isinstance(value, complex):
        raise ValueError("the root of a negative number")
    return value
