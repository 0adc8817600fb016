"""One safetensors file: written in a stream, verified while it is read.

Layout: length of the header (u64), header (JSON, padded with spaces so that data starts at a multiple of 4096), then
the tensors back to back, the widest types first so that each is aligned. Any safetensors reader opens it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
import xxhash

from orchestrator.backends.storage import Output
from orchestrator.checkpoints.manifest import FileEntry, TensorEntry
from orchestrator.checkpoints.tree import NotStorable
from orchestrator.errors import CheckpointCorrupt

_ALIGNMENT = 4096

_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


def write(output: Output, path: str, tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """Writes plain CPU tensors (see tree.py) and says what was written, hashes included."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise NotStorable(name, f"tensor of {tensor.dtype}", "safetensors has no such type")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head = _head({name: tensors[name] for name in order})
    output.write(head)
    entries = []
    for name in order:
        tensor = tensors[name]
        data = _data(tensor)
        output.write(data)
        entries.append(
            TensorEntry(
                name=name, dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape), size_bytes=len(data),
                xxh3=xxhash.xxh3_128_hexdigest(data),
            )
        )  # fmt: skip
    return FileEntry(
        path=path, size_bytes=len(head) + sum(entry.size_bytes for entry in entries), head_bytes=len(head),
        head_xxh3=xxhash.xxh3_128_hexdigest(head), tensors=tuple(entries),
    )  # fmt: skip


def read(source: BinaryIO, entry: FileEntry, uri: str) -> dict[str, torch.Tensor]:
    """The file's tensors. Raises CheckpointCorrupt unless every byte is as the manifest says."""
    head = source.read(entry.head_bytes)
    _compare(uri, entry.path, entry.head_xxh3, xxhash.xxh3_128_hexdigest(head))
    tensors = {}
    for expected in entry.tensors:
        if expected.dtype not in _TYPES:
            raise CheckpointCorrupt(uri, entry.path, "a known tensor type", expected.dtype)
        tensor = torch.empty(expected.shape, dtype=_TYPES[expected.dtype])
        data = _data(tensor)
        if len(data) != expected.size_bytes:
            raise CheckpointCorrupt(uri, entry.path, f"{expected.size_bytes} bytes of {expected.name}", f"{len(data)}")
        _fill(source, data)
        _compare(uri, f"{entry.path}:{expected.name}", expected.xxh3, xxhash.xxh3_128_hexdigest(data))
        tensors[expected.name] = tensor
    if source.read(1):
        raise CheckpointCorrupt(uri, entry.path, f"{entry.size_bytes} bytes", "more")
    return tensors


def _head(tensors: Mapping[str, torch.Tensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _data(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _fill(source: BinaryIO, data: memoryview) -> None:
    """Reads until `data` is full; a file that ends early leaves the rest as it is, which the hash shows."""
    while data:
        count = source.readinto(data)  # type: ignore[attr-defined]
        if not count:
            return
        data = data[count:]


def _compare(uri: str, file: str, expected: str, found: str) -> None:
    if expected != found:
        raise CheckpointCorrupt(uri, file, expected, found)
