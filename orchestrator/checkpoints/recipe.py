"""How a value was packed, so that the next one of the same structure is packed in a fraction of the time.

A recipe remembers where the tensors are, what they are called, and the JSON of all that holds some. It keeps no tensor:
a value follows it if its dicts have the same keys and its tensors stand in the same places; what has no tensors in it
(learning rates, counters, any structure) is packed anew each time. The result equals that of `tree.pack`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from orchestrator.checkpoints.tree import array_tensor, pack


class Changed(Exception):
    """The value has another structure than the recipe."""


class Step:
    """A place in the value. `packed` and `text` are its JSON as it was packed last, never changed in place."""

    packed: Any
    text: str

    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        """Appends the value's tensors in the order in which `pack` meets them; says whether its JSON is another than
        before. Raises Changed; then the recipe cannot be used any more."""
        raise NotImplementedError


def recipe(value: Any, packed: Any) -> Step:
    """From a value and what `pack` made of it. Raises Changed for what cannot be followed: tensors as keys."""
    if isinstance(value, torch.Tensor):
        return _Tensor(packed)
    if isinstance(value, np.ndarray):
        return _Array(packed)
    steps: list[tuple[Any, Step]]
    if isinstance(value, Mapping) and _is_mapping(packed):
        if _is_items(packed):
            pairs = packed["$items"]
            if any(_has_tensors(key) for key, _ in pairs):
                raise Changed
            steps = [(key, recipe(value[key], item)) for key, (_, item) in zip(value, pairs, strict=True)]
        else:
            steps = [(key, recipe(value[key], item)) for key, item in packed.items()]
    elif type(value) in (list, tuple):
        items = packed["$tuple"] if type(value) is tuple else packed
        steps = list(enumerate(map(recipe, value, items)))
    else:
        return _Free(packed)
    if all(isinstance(step, _Free) for _, step in steps):
        return _Free(packed)
    if isinstance(value, Mapping):
        if _is_items(packed):
            return _Items(type(value), packed, [step for _, step in steps])
        if all(isinstance(step, _Tensor) for _, step in steps):
            return _Tensors(type(value), packed)
        return _Dict(type(value), packed, [step for _, step in steps])
    return _List(type(value), packed, [step for _, step in steps])


def text_of(packed: Any) -> str:
    return json.dumps(packed, allow_nan=False)


class _Free(Step):
    def __init__(self, packed: Any) -> None:
        self.packed, self.text = packed, text_of(packed)

    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        packed = pack(value, _no_tensor)
        text = text_of(packed)
        if text == self.text:
            return False
        self.packed, self.text = packed, text
        return True


class _Tensor(Step):
    def __init__(self, packed: Any) -> None:
        self.packed, self.text = packed, text_of(packed)

    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        if not isinstance(value, torch.Tensor):
            raise Changed
        out.append(value)
        return False


class _Array(_Tensor):
    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        if not isinstance(value, np.ndarray):
            raise Changed
        out.append(array_tensor(value, ""))
        return False


class _Tensors(Step):
    """A dict of tensors alone: most of a state is in such."""

    def __init__(self, kind: type, packed: Mapping[str, Any]) -> None:
        self._kind: Any = kind
        self._keys = list(packed)
        self.packed, self.text = packed, text_of(packed)

    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        if type(value) is not self._kind or list(value) != self._keys:
            raise Changed
        out.extend(value.values())
        return False


class _Dict(Step):
    def __init__(self, kind: type, packed: Mapping[str, Any], steps: Sequence[Step]) -> None:
        self._kind: Any = kind
        self._keys, self._steps = list(packed), steps
        self._starts = [f"{text_of(key)}: " for key in packed]
        self.packed, self.text = packed, text_of(packed)

    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        if type(value) is not self._kind or list(value) != self._keys:
            raise Changed
        changed = [step.follow(item, out) for step, item in zip(self._steps, value.values(), strict=True)]
        if not any(changed):
            return False
        self.packed = {key: step.packed for key, step in zip(self._keys, self._steps, strict=True)}
        self.text = "{" + ", ".join(map(_joined, self._starts, self._steps)) + "}"
        return True


class _Items(Step):
    """A dict with other keys than strings: an optimizer's state, by the number of the parameter."""

    def __init__(self, kind: type, packed: Mapping[str, Any], steps: Sequence[Step]) -> None:
        pairs = packed["$items"]
        self._kind: Any = kind
        self._keys, self._steps = [key for key, _ in pairs], steps
        self._starts = [f"[{text_of(key)}, " for key in self._keys]
        self.packed, self.text = packed, text_of(packed)

    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        if type(value) is not self._kind or not _are_same(_packed_keys(value), self._keys):
            raise Changed
        changed = [step.follow(item, out) for step, item in zip(self._steps, value.values(), strict=True)]
        if not any(changed):
            return False
        self.packed = {"$items": [[key, step.packed] for key, step in zip(self._keys, self._steps, strict=True)]}
        self.text = '{"$items": [' + "], ".join(map(_joined, self._starts, self._steps)) + "]]}"
        return True


class _List(Step):
    def __init__(self, kind: type, packed: Any, steps: Sequence[Step]) -> None:
        self._kind: Any = kind
        self._steps = steps
        self.packed, self.text = packed, text_of(packed)

    def follow(self, value: Any, out: list[torch.Tensor]) -> bool:
        if type(value) is not self._kind or len(value) != len(self._steps):
            raise Changed
        changed = [step.follow(item, out) for step, item in zip(self._steps, value, strict=True)]
        if not any(changed):
            return False
        packed = [step.packed for step in self._steps]
        text = "[" + ", ".join(step.text for step in self._steps) + "]"
        is_tuple = self._kind is tuple
        self.packed, self.text = ({"$tuple": packed}, f'{{"$tuple": {text}}}') if is_tuple else (packed, text)
        return True


def _joined(start: str, step: Step) -> str:
    return start + step.text


def _no_tensor(path: str, tensor: torch.Tensor) -> Any:
    raise Changed


def _packed_keys(value: Mapping[Any, Any]) -> list[Any]:
    keys = list(value)
    return keys if set(map(type, keys)) == {int} else [pack(key, _no_tensor) for key in keys]


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """As JSON: 1, 1.0 and True are three."""
    return one == other and list(map(type, one)) == list(map(type, other))


def _is_mapping(packed: Any) -> bool:
    """A mapping that `pack` takes apart."""
    return isinstance(packed, dict) and (_is_items(packed) or not _is_special(packed))


def _is_special(packed: Mapping[str, Any]) -> bool:
    return len(packed) == 1 and next(iter(packed)).startswith("$")


def _is_items(packed: Mapping[str, Any]) -> bool:
    return len(packed) == 1 and "$items" in packed


def _has_tensors(packed: Any) -> bool:
    if isinstance(packed, dict):
        is_one = len(packed) == 1 and ("$tensor" in packed or "$ndarray" in packed)
        return is_one or any(map(_has_tensors, packed.values()))
    return isinstance(packed, list) and any(map(_has_tensors, packed))
