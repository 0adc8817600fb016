"""PostgreSQL's binary formats, packed and unpacked with numpy: no Python object per number.

An array is: dimensions, whether it has nulls, OID of the elements, length, lower bound; then length and bytes of each
element. A COPY stream is: a header, rows (number of columns, then length and bytes of each), an end. All numbers are
big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from psycopg import Connection, Cursor
from psycopg.abc import AdaptContext
from psycopg.adapt import Buffer, Dumper, Loader
from psycopg.pq import Format

COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_END = struct.pack(">h", -1)

ARRAY_HEADER = struct.Struct(">iiIii")
INT4, INT8, FLOAT8 = 23, 20, 701
ARRAY_OID = {INT4: 1007, INT8: 1016, FLOAT8: 1022}
ELEMENT = {
    oid: np.dtype([("length", ">i4"), ("value", kind)]) for oid, kind in ((INT4, ">i4"), (INT8, ">i8"), (FLOAT8, ">f8"))
}
_OID_OF = {np.dtype(np.int32): INT4, np.dtype(np.int64): INT8, np.dtype(np.float64): FLOAT8}


def elements(values: np.ndarray, oid: int) -> bytes:
    """The elements as they stand in an array, without its header; a slice is the body of a shorter array."""
    packed = np.empty(len(values), dtype=ELEMENT[oid])
    packed["length"] = packed.dtype["value"].itemsize
    packed["value"] = values
    return packed.tobytes()


def array_header(oid: int, length: int) -> bytes:
    return ARRAY_HEADER.pack(1, 0, oid, length, 1)


def unpacked(data: Buffer) -> np.ndarray:
    """A one-dimensional int4[], int8[] or float8[] without nulls."""
    dimensions, _, oid = struct.unpack_from(">iiI", data)
    if dimensions == 0:
        return np.empty(0, ELEMENT[oid]["value"].newbyteorder("="))
    found = np.frombuffer(data, dtype=ELEMENT[oid], offset=ARRAY_HEADER.size)["value"]
    return found.astype(found.dtype.newbyteorder("="))


def row(longs: Iterable[int], ints: Iterable[int], arrays: Sequence[np.ndarray]) -> bytes:
    """A row of binary COPY: columns of bigint, then of integer, then arrays of int32, int64 or float64."""
    numbers = [*(struct.pack(">iq", 8, each) for each in longs), *(struct.pack(">ii", 4, each) for each in ints)]
    parts = [struct.pack(">h", len(numbers) + len(arrays)), *numbers]
    for array in arrays:
        oid = _OID_OF[array.dtype]
        packed = elements(array, oid)
        parts += (struct.pack(">i", ARRAY_HEADER.size + len(packed)), array_header(oid, len(array)), packed)
    return b"".join(parts)


class ArrayDumper(Dumper):
    """Sends a one-dimensional int32, int64 or float64 array as int4[], int8[] or float8[]."""

    format = Format.BINARY

    def __init__(self, cls: type, context: AdaptContext | None = None, oid: int = 0) -> None:
        super().__init__(cls, context)
        self._element = oid
        self.oid = ARRAY_OID.get(oid, 0)

    def get_key(self, obj: Any, format: Any) -> Any:
        return (self.cls, obj.dtype)

    def upgrade(self, obj: Any, format: Any) -> Dumper:
        return ArrayDumper(self.cls, oid=_OID_OF[obj.dtype])

    def dump(self, obj: Any) -> bytes:
        return array_header(self._element, len(obj)) + elements(obj, self._element)


class ArrayLoader(Loader):
    """Receives them as numpy arrays; only for binary cursors."""

    format = Format.BINARY

    def load(self, data: Buffer) -> np.ndarray:
        return unpacked(data)


def numpy_cursor(connection: Connection[Any], *, name: str = "") -> Cursor[Any]:
    """A binary cursor that takes and gives numpy arrays; with a name it is the server's, and rows come in pieces."""
    cursor: Any = connection.cursor(name, binary=True) if name else connection.cursor(binary=True)
    cursor.adapters.register_dumper(np.ndarray, ArrayDumper)
    for oid in ARRAY_OID.values():
        cursor.adapters.register_loader(oid, ArrayLoader)
    return cursor
