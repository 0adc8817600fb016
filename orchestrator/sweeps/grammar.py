"""Text -> what was written: `loguniform(1e-4, 1e-1)`, `16,32,64`, `when(hidden in [32,64], uniform(0,0.5))`.

Nothing is evaluated: Python's parser gives a tree, and of that a handful of node types are read. What a domain means,
and whether its numbers make sense, is space.py's.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from orchestrator.config.names import did_you_mean, nearest
from orchestrator.config.redaction import redact_value
from orchestrator.errors import ConfigError

_MANY = 1_000_000

DOMAINS: Mapping[str, tuple[str, int, int]] = {
    "uniform": ("uniform(a, b)", 2, 2),
    "loguniform": ("loguniform(a, b)", 2, 2),
    "quniform": ("quniform(a, b, q)", 3, 3),
    "qloguniform": ("qloguniform(a, b, q)", 3, 3),
    "randint": ("randint(a, b)", 2, 2),
    "lograndint": ("lograndint(a, b)", 2, 2),
    "qrandint": ("qrandint(a, b, q)", 3, 3),
    "normal": ("normal(mu, sigma[, low, high])", 2, 4),
    "qnormal": ("qnormal(mu, sigma, q[, low, high])", 3, 5),
    "lognormal": ("lognormal(mu, sigma[, low, high])", 2, 4),
    "choice": ("choice(x, y, …)", 0, _MANY),
    "boolean": ("boolean()", 0, 0),
    "grid": ("grid(x, y, …)", 0, _MANY),
    "range": ("range(a, b[, step])", 1, 3),
    "interval": ("interval(a, b)", 2, 2),
    "fixed": ("fixed(x)", 1, 1),
}
"""Name -> how it is written, fewest and most arguments."""

WHEN = "when"
_WHEN_WRITTEN = "when(key == x, domain), when(key != x, domain) or when(key in [x, y], domain)"
_NAMES = (*DOMAINS, WHEN)
_HYDRAS = frozenset({"int", "float", "str", "bool", "json_str", "glob", "sort", "shuffle", "tag", "extend_list"})
"""Functions of Hydra's grammar that are no domains: they stay Hydra's, however much they look like one of ours."""
_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*\(")
_WORDS = {"true": True, "false": False, "null": None, "inf": math.inf}
_OPERATORS: Mapping[type[ast.cmpop], str] = {ast.Eq: "==", ast.NotEq: "!=", ast.In: "in"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """`hidden in [32, 64]` is Condition(key="hidden", operator="in", value=[32, 64])."""

    key: str
    operator: str
    value: Any

    def holds(self, value: Any) -> bool:
        """Whether it does where the other key has that value."""
        if self.operator == "in":
            return any(same(value, item) for item in self.value)
        return same(value, self.value) == (self.operator == "==")

    def __str__(self) -> str:
        key = self.key if _is_dotted_name(self.key) else literal(self.key)
        return f"{key} {self.operator} {literal(self.value)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """What was written for one key. Example: Expression(name="uniform", arguments=(0, 0.5), when=None)."""

    name: str
    arguments: tuple[Any, ...]
    when: Condition | None = None


def parse(key: str, text: str) -> Expression | None:
    """What `text` asks to be searched for `key`; None if it is one value, as any override has.

    It is a domain if it calls one of `DOMAINS` or `when`, or is a comma list outside brackets. Raises ConfigError with
    the key and the column (from 1) for what cannot be read, and for a name that looks like one of ours.
    """
    if _has_top_comma(text):
        return _Reader(key, text).comma_list()
    found = _CALL.match(text)
    if found is None or found[1] in _HYDRAS:
        return None
    if found[1] not in _NAMES:
        near = nearest(found[1].lower(), _NAMES, cutoff=0.7)
        if not near:
            return None
        hint = f"Did you mean {near}? To give that text as it is, quote it twice: {key}='\"…\"'."
        raise ConfigError(key, redact_value(key, text), f"there is no domain {found[1]}.", hint)
    return _Reader(key, text).domain()


def from_config(key: str, given: Any) -> Expression:
    """What `sweep.space` in a file says of `key`: text as on the command line, or a mapping.

    Example: {"uniform": [0, 0.5], "when": "hidden in [32, 64]"}. Raises ConfigError as `parse` does, and for what is no
    domain.
    """
    if isinstance(given, str):
        expression = parse(key, given)
        if expression is None:
            refuse(key, given, "is one value, no domain.", "Write fixed(…) for a constant, or name what to search.")
        return expression
    if isinstance(given, Mapping):
        return _from_mapping(key, given)
    why = "is one value, no domain." if not isinstance(given, Sequence) else "is a list: of what kind is not said."
    refuse(key, given, why, "Write choice(x, y) for one of them, grid(x, y) for each of them, fixed(x) for a constant.")


def condition(key: str, text: str) -> Condition:
    """The condition under which `key` is searched. Raises ConfigError naming `key`."""
    reader = _Reader(key, text)
    return reader.condition(reader.tree())


def literal(value: Any) -> str:
    """The value as the grammar writes it: `parse` reads it back equal."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            # Escaped beyond ASCII, so that NUL and lone surrogates pass through a database.
            return ascii(value)
        case Mapping():
            return "{" + ", ".join(f"{literal(name)}: {literal(item)}" for name, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(literal, value)) + "]"
        case _:
            return repr(value)


def read_literal(key: str, text: str) -> Any:
    """What `literal` wrote. Raises ConfigError naming `key`."""
    reader = _Reader(key, text)
    return reader.value(reader.tree())


def same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 and 1.0 are one number, true and 1 are not."""
    return token(one) == token(other)


def token(value: Any) -> str:
    """Equal for values that are the `same`, different for others."""
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{literal(name)}: {token(item)}" for name, item in value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(token, value)) + "]"
    return literal(value)


def refuse(key: str, given: Any, why: str, hint: str = "") -> NoReturn:
    """Raises ConfigError; what was given is shown without secrets."""
    raise ConfigError(key, redact_value(key, given), why, hint)


def parsed_python(key: str, text: str) -> ast.expr:
    """The tree of an expression in Python's syntax. Raises ConfigError naming `key`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes and comparisons, written to stderr
            tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        column = (error.offset or 1) + len(text) - len(text.lstrip())
        refuse(key, text, f"cannot be read at column {column}: {error.msg}.", _QUOTE)
    except (ValueError, RecursionError, MemoryError) as error:
        refuse(key, text[:200], f"cannot be read: {error}.", _QUOTE)
    level: list[ast.AST] = [tree]
    for _ in range(_DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return tree
    refuse(key, text[:200], f"is nested more than {_DEEPEST} deep.")


_DEEPEST = 100
"""Whoever walks the tree afterwards does so by recursion."""

_QUOTE = 'Text other than a plain word needs quotes: choice("resnet-18", b).'


class _Reader:
    """One text of one key; everything it refuses names both."""

    def __init__(self, key: str, text: str) -> None:
        self._key, self._text = key, text

    def tree(self) -> ast.expr:
        return parsed_python(self._key, self._text)

    def comma_list(self) -> Expression:
        node = self.tree()
        if not isinstance(node, ast.Tuple):
            self._refuse(node, "is no list of values")
        return Expression(name="grid", arguments=tuple(map(self.value, node.elts)))

    def domain(self) -> Expression:
        return self._domain(self.tree(), may_be_conditional=True)

    def _domain(self, node: ast.expr, *, may_be_conditional: bool) -> Expression:
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            self._refuse(node, "is no domain", f"A domain is one of: {', '.join(DOMAINS)}.")
        name = node.func.id
        if node.keywords:
            self._refuse(node.keywords[0].value, "has a name", "Arguments are given in their order, without names.")
        if name == WHEN:
            if not may_be_conditional:
                self._refuse(node, "is a condition within a condition", _ONE_CONDITION)
            if len(node.args) != 2:
                self._refuse(node, "is no condition with a domain", f"Write {_WHEN_WRITTEN}.")
            inner = self._domain(node.args[1], may_be_conditional=False)
            return Expression(name=inner.name, arguments=inner.arguments, when=self.condition(node.args[0]))
        if name not in DOMAINS:
            near = did_you_mean(name.lower(), _NAMES)
            self._refuse(node.func, "is no domain", near or f"Domains are: {', '.join(DOMAINS)}.")
        arguments = tuple(map(self.value, node.args))
        return _checked(self._key, self._text, Expression(name=name, arguments=arguments))

    def condition(self, node: ast.expr) -> Condition:
        if not isinstance(node, ast.Compare) or len(node.ops) != 1 or type(node.ops[0]) not in _OPERATORS:
            self._refuse(node, "is no condition", f"Write {_WHEN_WRITTEN}.")
        key = node.left.value if isinstance(node.left, ast.Constant) else dotted_name(node.left)
        if not isinstance(key, str) or not key:
            self._refuse(node.left, "is no key", f"Write {_WHEN_WRITTEN}.")
        operator, value = _OPERATORS[type(node.ops[0])], self.value(node.comparators[0])
        if operator == "in" and (not isinstance(value, list) or not value):
            self._refuse(node.comparators[0], "is no list of values", f"Write {_WHEN_WRITTEN}.")
        return Condition(key=key, operator=operator, value=value)

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str()):
                return node.value
            case ast.Name(id=name) if name == "nan":
                self._refuse(node, "is no value that can be searched")
            case ast.Name(id=name):
                return _WORDS.get(name, name)
            case ast.List() | ast.Tuple():
                return [self.value(item) for item in node.elts]
            case ast.Dict():
                return {self._name(name, node): self.value(item) for name, item in zip(node.keys, node.values)}  # noqa: B905
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                value = self.value(node.operand)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    self._refuse(node, "is no number")
                return -value if isinstance(node.op, ast.USub) else value
            case ast.Call(func=ast.Name(id=name)) if name in _NAMES:
                self._refuse(node, "is a domain within a domain", "A key has one domain.")
            case _:
                self._refuse(node, "is neither a number, a word, a list nor a mapping")

    def _name(self, node: ast.expr | None, mapping: ast.Dict) -> str:
        if node is None:
            self._refuse(mapping, "unpacks a mapping")
        name = node.id if isinstance(node, ast.Name) else self.value(node)
        if not isinstance(name, str):
            self._refuse(node, "is no name", "Names in a mapping are words or quoted text.")
        return name

    def _refuse(self, node: ast.expr, why: str, hint: str = "") -> NoReturn:
        stripped = self._text.strip()
        before = stripped.splitlines()[node.lineno - 1].encode()[: node.col_offset].decode(errors="replace")
        column = len(before) + 1 + (len(self._text) - len(self._text.lstrip()) if node.lineno == 1 else 0)
        part = redact_value(self._key, ast.get_source_segment(stripped, node) or stripped)
        refuse(self._key, self._text, f"`{part}` at column {column} {why}.", hint or _QUOTE)


_ONE_CONDITION = "A key has one condition; a chain is written key by key, each with the one before it."


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain or a name, else ""."""
    if isinstance(node, ast.Attribute):
        parent = dotted_name(node.value)
        return f"{parent}.{node.attr}" if parent else ""
    return node.id if isinstance(node, ast.Name) else ""


def _checked(key: str, given: Any, expression: Expression) -> Expression:
    written, fewest, most = DOMAINS[expression.name]
    if not fewest <= len(expression.arguments) <= most:
        refuse(key, given, f"{expression.name} does not take {len(expression.arguments)} values.", f"Write {written}.")
    return expression


def _from_mapping(key: str, given: Mapping[Any, Any]) -> Expression:
    names = [name for name in given if name != WHEN]
    if len(names) != 1 or not isinstance(names[0], str):
        hint = 'Write {choice: [a, b]}, and where it depends on another key {choice: [a, b], when: "key == x"}.'
        refuse(key, given, "is no domain: a mapping names one.", hint)
    name = names[0]
    if name not in DOMAINS:
        near = did_you_mean(name.lower(), DOMAINS)
        refuse(key, given, f"there is no domain {name}.", near or f"Domains are: {', '.join(DOMAINS)}.")
    inside = given[name]
    arguments = tuple(inside) if isinstance(inside, Sequence) and not isinstance(inside, str) else (inside,)
    if name == "boolean" and arguments in ((None,), ({},)):
        arguments = ()
    if name == "fixed":
        arguments = (inside,)
    plain = tuple(_plain(key, item) for item in arguments)
    when = given.get(WHEN)
    if when is not None and not isinstance(when, str):
        refuse(key, given, "the condition is no text.", 'Write {choice: [a, b], when: "key == x"}.')
    parsed = None if when is None else condition(key, when)
    return _checked(key, given, Expression(name=name, arguments=plain, when=parsed))


def _plain(key: str, value: Any) -> Any:
    """The value if the grammar could have written it."""
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            refuse(key, value, "names in a mapping are text.")
        return {name: _plain(key, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and not math.isnan(value)):
        return value
    refuse(key, str(value), "is no value that can be searched.")


def _has_top_comma(text: str) -> bool:
    depth, quote, escaped = 0, "", False
    for character in text:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote, escaped = character, False
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            return True
    return False


def _is_dotted_name(key: str) -> bool:
    parts = key.split(".")
    return key.isascii() and all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)
