"""What one safetensors file looks like, byte for byte, before any tensor is written.

Layout: length of the header (u64), header (JSON, padded with spaces so that the tensors begin at a multiple of 4096),
then the tensors back to back, the widest types first so that each is aligned. Any safetensors reader opens it. The
places depend on names, types and shapes alone: an image is made once and filled at every save.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.checkpoints.manifest import FileEntry, TensorEntry

PAGE_BYTES = 4096
"""What images, and everything that is written past the page cache, are aligned to."""

SIZES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the name that safetensors gives the type."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before its bytes. Example: TensorSpec("fc.weight", "F32", (10, 64), 2560, True)."""

    name: str
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    size_bytes: int
    is_shared: bool
    """The same on all ranks, so any of them may write it; else it is rank 0's."""
    offsets: tuple[int, ...] | None = None
    """Of a part of a split tensor: where it begins in each dimension of the whole."""
    full_shape: tuple[int, ...] | None = None
    """Of a part of a split tensor: the shape of the whole."""
    holders: tuple[int, ...] = ()
    """Of a part of a split tensor: the ranks that have this part, one for each copy of the whole, in an order that is
    the same for all parts."""

    @property
    def full_bytes(self) -> int:
        """Of the whole of which it may be a part."""
        return self.size_bytes if self.full_shape is None else SIZES[self.dtype] * math.prod(self.full_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where one tensor lies in an image."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Bytes from the beginning of the image, the head included."""
    size_bytes: int
    offsets: tuple[int, ...] | None = None
    full_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One file. Its pieces follow each other in this order without holes, from `head_bytes` to `size_bytes`."""

    path: str
    """Relative to the checkpoint's directory."""
    head_bytes: int
    size_bytes: int
    pieces: tuple[Piece, ...]

    @property
    def room_bytes(self) -> int:
        """What it takes in a slot: its size, rounded up to 4096."""
        return rounded_up(self.size_bytes)


def rounded_up(size_bytes: int, unit: int = PAGE_BYTES) -> int:
    return -(-size_bytes // unit) * unit


def image(path: str, tensors: Sequence[TensorSpec]) -> tuple[Image, bytes]:
    """Places tensors widest first, then by name, back to back; gives the image and its head (length word, JSON, spaces
    to 4096). Raises ValueError for an unknown type, a size that is not that of the shape, or a double name."""
    for tensor in tensors:
        _check(path, tensor)
    order = sorted(tensors, key=lambda tensor: (-SIZES[tensor.dtype], tensor.name))
    if len({tensor.name for tensor in order}) != len(order):
        raise ValueError(f"{path}: two tensors have one name")
    metadata = {"format": "pt"}
    if any(tensor.offsets is not None for tensor in order):
        # torch's reader wants every tensor of the file in it as soon as it is there.
        saved = {tensor.name: {"saved_offsets": list(tensor.offsets or (0,) * len(tensor.shape))} for tensor in order}
        metadata["DCP_SHARDING_INFO"] = json.dumps(saved, separators=(",", ":"))
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for tensor in order:
        end = at + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    head = struct.pack("<Q", len(text)) + text
    pieces, start = [], len(head)
    for tensor in order:
        pieces.append(
            Piece(
                name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, start=start, size_bytes=tensor.size_bytes,
                offsets=tensor.offsets, full_shape=tensor.full_shape,
            )
        )  # fmt: skip
        start += tensor.size_bytes
    return Image(path=path, head_bytes=len(head), size_bytes=start, pieces=tuple(pieces)), head


def raw_image(path: str, size_bytes: int) -> Image:
    """A file of plain bytes: no head, one piece of type U8, named like the file."""
    piece = Piece(name=path, dtype="U8", shape=(size_bytes,), start=0, size_bytes=size_bytes)
    return Image(path=path, head_bytes=0, size_bytes=size_bytes, pieces=(piece,))


def file_entry(image: Image, head_xxh3: str, hashes: Sequence[str]) -> FileEntry:
    """What the manifest says of an image that was written. `hashes` are those of its pieces, in their order."""
    if len(hashes) != len(image.pieces):
        raise ValueError(f"{image.path}: {len(hashes)} hashes for {len(image.pieces)} tensors")
    tensors = tuple(
        TensorEntry(
            name=piece.name, dtype=piece.dtype, shape=piece.shape, size_bytes=piece.size_bytes, xxh3=xxh3,
            offsets=piece.offsets, full_shape=piece.full_shape,
        )
        for piece, xxh3 in zip(image.pieces, hashes, strict=True)
    )  # fmt: skip
    return FileEntry(
        path=image.path, size_bytes=image.size_bytes, head_bytes=image.head_bytes, head_xxh3=head_xxh3, tensors=tensors
    )


def _check(path: str, tensor: TensorSpec) -> None:
    if tensor.dtype not in SIZES:
        raise ValueError(f"{path}: {tensor.name} is of type {tensor.dtype}, which safetensors does not have")
    size = SIZES[tensor.dtype]
    for length in tensor.shape:
        size *= length
    if size != tensor.size_bytes:
        raise ValueError(f"{path}: {tensor.name} of shape {tensor.shape} has {size} bytes, not {tensor.size_bytes}")
    if (tensor.offsets is None) != (tensor.full_shape is None):
        raise ValueError(f"{path}: {tensor.name} is a part without its place, or has a place in nothing")
