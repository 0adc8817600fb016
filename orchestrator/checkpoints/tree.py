"""Nested Python values as JSON, exactly and without pickle.

What JSON lacks is written as a dict with one key that starts with `$`: `$float` nan and infinities · `$tuple` ·
`$items` dicts with other keys than strings · `$counter` · `$bytes` (base64) · `$tensor`, `$ndarray` a reference that
the caller's `put` made · `$dtype`, `$device` of torch. Anything else is refused by name.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from orchestrator.errors import CheckpointError, UserError

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Types of tensors that have all their values, in one place."""
_SIMPLE = frozenset({bool, int, str, type(None)})
"""What JSON has as it is."""

Put = Callable[[str, torch.Tensor], Any]
"""Stores the tensor found at a path and gives the JSON that refers to it."""
Get = Callable[[Any], torch.Tensor]
"""The inverse of a Put."""


class NotStorable(CheckpointError, UserError):
    """A value that cannot be written without pickle."""

    def __init__(self, path: str, kind: str, why: str = "") -> None:
        super().__init__(path, kind, why)
        self.path, self.kind, self.why = path, kind, why

    def __str__(self) -> str:
        why = self.why or "checkpoints hold no pickled objects"
        return (
            f"{self.path} is a {self.kind}, which cannot be stored: {why}. "
            "Give tensors, arrays, numbers, text, lists, dicts, or an object with state_dict() and load_state_dict()."
        )


def pack(value: Any, put: Put, path: str = "") -> Any:
    """`value` as JSON. Raises NotStorable naming the path."""
    kind = type(value)
    if kind in PLAIN:  # first: there are thousands of them, and a save must not take long
        return {"$tensor": put(path, _plain(value, path))}
    if kind in _SIMPLE:
        return value
    if isinstance(value, torch.Tensor):
        return {"$tensor": put(path, _plain(value, path))}
    if isinstance(value, np.ndarray):
        return {"$ndarray": put(path, array_tensor(value, path))}
    if isinstance(value, np.generic):
        return pack(value.item(), put, path)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, Counter):
        return {"$counter": [[pack(k, put, path), n] for k, n in value.items()]}
    if isinstance(value, Mapping):
        return _pack_mapping(value, put, path)
    if kind is tuple or isinstance(value, torch.Size):
        if set(map(type, value)) <= _SIMPLE:  # the state of Python's generator: 625 numbers, in every save
            return {"$tuple": list(value)}
        return {"$tuple": [pack(item, put, f"{path}.{i}") for i, item in enumerate(value)]}
    if kind is list:
        if set(map(type, value)) <= _SIMPLE:  # the numbers of an optimizer's parameters: thousands
            return list(value)
        return [pack(item, put, f"{path}.{i}") for i, item in enumerate(value)]
    raise NotStorable(path, f"{type(value).__module__}.{type(value).__qualname__}")


def unpack(raw: Any, get: Get) -> Any:
    """The value that `pack` was given."""
    if isinstance(raw, list):
        return [unpack(item, get) for item in raw]
    if not isinstance(raw, dict):
        return raw
    if len(raw) != 1 or not next(iter(raw)).startswith("$"):
        return {key: unpack(item, get) for key, item in raw.items()}
    (kind, content), *_ = raw.items()
    match kind:
        case "$tensor":
            return get(content)
        case "$ndarray":
            return get(content).numpy()
        case "$float":
            return float(content)
        case "$tuple":
            return tuple(unpack(item, get) for item in content)
        case "$items":
            return {unpack(key, get): unpack(item, get) for key, item in content}
        case "$counter":
            return Counter({unpack(key, get): n for key, n in content})
        case "$bytes":
            return base64.b64decode(content)
        case "$dtype":
            return getattr(torch, content)
        case "$device":
            return torch.device(content)
    raise CheckpointError(f"{kind} is unknown to this version; the checkpoint was written by a newer one.")


def inline(path: str, tensor: torch.Tensor) -> Any:
    """A Put that keeps small tensors inside the JSON."""
    if type(tensor) not in PLAIN:
        raise NotStorable(path, type(tensor).__qualname__, "what is a rank's own must be plain tensors")
    data = _bytes_of(tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def from_inline(reference: Any) -> torch.Tensor:
    data = bytearray(base64.b64decode(reference["data"]))
    dtype = getattr(torch, reference["dtype"])
    tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return tensor.reshape(reference["shape"]).clone()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return raw(tensor).tobytes() if tensor.numel() else b""


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, on the CPU, with the values themselves in memory; shares memory where that is so already."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def raw(tensor: torch.Tensor) -> memoryview:
    """Its bytes; without a copy where it is dense already."""
    flat = dense(tensor).reshape(-1)
    if flat.stride(0) != 1:  # a single element counts as contiguous whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def _pack_mapping(value: Mapping[Any, Any], put: Put, path: str) -> Any:
    at = f"{path}." if path else ""
    if all(isinstance(key, str) for key in value) and not any(key.startswith("$") for key in value):
        return {key: pack(item, put, f"{at}{key}") for key, item in value.items()}
    return {"$items": [[pack(key, put, f"{at}{key}"), pack(item, put, f"{at}{key}")] for key, item in value.items()]}


def _plain(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """The tensor itself, if a checkpoint can hold it: where it lies and how is the writer's to see to."""
    if type(tensor) not in PLAIN and type(tensor).__name__ != "DTensor":  # to import that type takes half a second
        raise NotStorable(path, type(tensor).__qualname__, "only plain tensors and DTensors are supported")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise NotStorable(path, "tensor", "it is sparse, quantized or has no data")
    return tensor


def array_tensor(array: np.ndarray, path: str) -> torch.Tensor:
    """A tensor of the same values, in the same memory where that can be. Raises NotStorable."""
    try:
        # A copy where needed: torch knows neither negative strides nor read-only arrays nor foreign byte order.
        return torch.from_numpy(np.require(array, dtype=array.dtype.newbyteorder("="), requirements=["C", "W"]))
    except TypeError as error:
        raise NotStorable(path, f"numpy array of {array.dtype}", "torch has no such type") from error
