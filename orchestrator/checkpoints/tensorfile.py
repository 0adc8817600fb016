"""One safetensors file, verified while it is read; image.py says how it is laid out.

Reading goes in steps of 1 MiB, straight to where the bytes shall be, and hashes each step while it is still in the
processor's cache: verifying costs no second pass over the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
import xxhash

from orchestrator.checkpoints.manifest import FileEntry, TensorEntry
from orchestrator.errors import CheckpointCorrupt

_STEP = 1 << 20

NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
"""What safetensors calls torch's types."""
TYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Bytes of one file that follow each other: what one thread reads at a time."""

    file: FileEntry
    start: int
    """Where its first tensor begins in the file."""
    tensors: tuple[TensorEntry, ...]
    is_first: bool
    """The file's head belongs to it."""
    is_last: bool
    """The file must end behind it."""

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors) + (self.file.head_bytes if self.is_first else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something in a file that is not as the manifest says."""

    tensor: str
    """"" for the file's head or its length."""
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Into:
    """Where the bytes of a tensor from number `begin` on go; those before and behind are hashed and dropped."""

    view: memoryview
    begin: int = 0


def parts(file: FileEntry, at_least_bytes: int = 0, names: Collection[str] | None = None) -> list[Part]:
    """The file in parts of that many bytes of tensors or a little more; 0 gives the whole file as one. With `names`
    only the file's head and what is named: such a file is read in places."""
    groups: list[tuple[int, list[TensorEntry]]] = [(file.head_bytes, [])]
    room, at, is_gap = at_least_bytes, file.head_bytes, False
    for tensor in file.tensors:
        if names is not None and tensor.name not in names:
            is_gap = True
        else:
            if is_gap or (at_least_bytes and room <= 0):
                groups.append((at, []))
                room, is_gap = at_least_bytes, False
            groups[-1][1].append(tensor)
            room -= tensor.size_bytes
        at += tensor.size_bytes
    return [
        Part(file=file, start=start, tensors=tuple(group), is_first=i == 0, is_last=i == len(groups) - 1 and not is_gap)
        for i, (start, group) in enumerate(groups)
    ]


def read_part(source: BinaryIO, part: Part, uri: str, into: Callable[[TensorEntry], Into | None]) -> None:
    """Reads the tensors of a part to where `into` says (None: nowhere, but verified). `source` must be seekable for a
    part that is not the first.

    Raises CheckpointCorrupt at the first difference; then nothing of the part may be used.
    """
    for difference in _compared(source, part, into):
        where = f"{part.file.path}:{difference.tensor}" if difference.tensor else part.file.path
        raise CheckpointCorrupt(uri, where, difference.expected, difference.found)


def differences(source: BinaryIO, part: Part) -> list[Difference]:
    """All that is wrong in a part; it takes 1 MiB of memory. `source` as for `read_part`."""
    return list(_compared(source, part, lambda tensor: None))


def empty(shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Memory for a tensor of that type, as safetensors calls it."""
    return torch.empty(tuple(shape), dtype=TYPES[dtype])


def _compared(source: BinaryIO, part: Part, into: Callable[[TensorEntry], Into | None]) -> Iterator[Difference]:
    """Gives what differs, in the file's order."""
    file = part.file
    scratch = memoryview(bytearray(_STEP))
    if part.is_first:
        found = _hash_in(source, file.head_bytes, None, scratch)
        if found != file.head_xxh3:
            yield Difference(tensor="", expected=file.head_xxh3, found=found)
    else:
        source.seek(part.start)
    for tensor in part.tensors:
        found = _hash_in(source, tensor.size_bytes, into(tensor), scratch)
        if found != tensor.xxh3:
            yield Difference(tensor=tensor.name, expected=tensor.xxh3, found=found)
    if part.is_last and source.read(1):
        yield Difference(tensor="", expected=f"{file.size_bytes} bytes", found="more")


def _hash_in(source: BinaryIO, size: int, into: Into | None, scratch: memoryview) -> str:
    """Hash of the next `size` bytes; of fewer, if the file ends before."""
    digest = xxhash.xxh3_128()
    if into is None:
        stretches: list[tuple[int, memoryview | None]] = [(size, None)]
    else:
        behind = size - into.begin - len(into.view)
        stretches = [(into.begin, None), (len(into.view), into.view), (behind, None)]
    for length, view in stretches:
        done = 0
        while done < length:
            step = min(_STEP, length - done)
            place = view[done : done + step] if view is not None else scratch[:step]
            count = source.readinto(place)  # type: ignore[attr-defined]
            if not count:
                return digest.hexdigest()
            digest.update(place[:count])
            done += count
    return digest.hexdigest()


def check_type(tensor: TensorEntry, file: FileEntry, uri: str) -> None:
    """Raises CheckpointCorrupt for a type or a size that cannot be."""
    if tensor.dtype not in TYPES:
        raise CheckpointCorrupt(uri, file.path, "a known tensor type", tensor.dtype)
    size = math.prod(tensor.shape) * TYPES[tensor.dtype].itemsize
    if size != tensor.size_bytes:
        raise CheckpointCorrupt(uri, file.path, f"{tensor.size_bytes} bytes of {tensor.name}", f"{size}")


def data(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)
