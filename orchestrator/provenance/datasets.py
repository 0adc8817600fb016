"""Fingerprints of data: of files by content (or cheaply, by size and time), of arrays and tensors by value."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from orchestrator.config import redact_url
from orchestrator.errors import UserError

CHUNK_BYTES = 1 << 20


class Method(StrEnum):
    """How a fingerprint is made; its text begins with the name."""

    xxh128 = "xxh128"
    """Content, at the speed of the disk. Against accidents, not against forgery."""
    sha256 = "sha256"
    """Content."""
    stat = "stat"
    """Sizes and times of change of files, without reading them: a copy has another one, a swapped bit does not."""


class BadDataset(UserError):
    """Something that has no fingerprint, or a declaration without sense."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why

    def __str__(self) -> str:
        return f"{self.what} {self.why}"


def fingerprint(source: Any, *, method: str = "xxh128") -> str:
    """Of a file, a directory (names and contents), an array or tensor, or a list or mapping of these.

    Equal data have equal fingerprints wherever they lie; an array and a tensor of equal type and values, too. Example:
    `fingerprint("data/train")` == "xxh128:…"; `method` is xxh128, sha256 or stat (files only).
    """
    try:
        chosen = Method(method)
    except ValueError:
        raise BadDataset("fingerprint: method", f"is {method!r}; it is {', '.join(Method)}.") from None
    digest = _new(chosen)
    for part in _parts(source, chosen):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"{chosen}:{digest.hexdigest()}"


def declared(
    name: str,
    *,
    fingerprint: str = "",
    uri: str = "",
    version: str = "",
    size: int | None = None,
    split: str = "",
    details: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """A dataset under the key by which a record keeps it. Raises BadDataset."""
    if not name or not isinstance(name, str):
        raise BadDataset("dataset: name", f"is {name!r}; it is a text that is not empty.")
    if size is not None and (isinstance(size, bool) or int(size) != size or size < 0):
        raise BadDataset(f"dataset {name}: size", f"is {size!r}; it is the number of samples.")
    values = {
        "name": name,
        "split": split,
        "version": str(version),
        "fingerprint": str(fingerprint),
        "uri": _without_query(redact_url(str(uri))),
        "size": None if size is None else int(size),
        **({"details": dict(details)} if details else {}),
    }
    return f"{name}/{split}" if split else name, {k: v for k, v in values.items() if v not in ("", None)}


def _without_query(uri: str) -> str:
    """Presigned addresses carry their signature there."""
    return uri.partition("?")[0] if "://" in uri else uri


def _new(method: Method) -> Any:
    return xxhash.xxh3_128() if method is Method.xxh128 else hashlib.sha256()


def _parts(source: Any, method: Method) -> Iterator[bytes]:
    """What is hashed, piece by piece; each piece enters with its length, so that pieces cannot flow together."""
    if isinstance(source, str | os.PathLike):
        yield from _of_path(Path(source), method)
    elif isinstance(source, Mapping):
        for key in sorted(source, key=str):
            yield str(key).encode()
            yield from _parts(source[key], method)
    elif isinstance(source, bytes | bytearray | memoryview):
        yield b"bytes"
        yield bytes(source)
    elif hasattr(source, "__array__") or hasattr(source, "detach") or isinstance(source, np.ndarray):
        if method is Method.stat:
            raise BadDataset("fingerprint: method stat", "is for files; an array has no time of change.")
        yield from _of_array(source)
    elif isinstance(source, Iterable):
        items = list(source)
        # Of files the set counts, of arrays the order.
        if items and all(isinstance(item, str | os.PathLike) for item in items):
            items.sort(key=os.fspath)
        yield f"list {len(items)}".encode()
        for item in items:
            yield from _parts(item, method)
    else:
        raise BadDataset(
            f"fingerprint: {type(source).__qualname__}",
            "is no path, array, tensor, bytes, or list or mapping of these.",
        )


def _of_path(path: Path, method: Method) -> Iterator[bytes]:
    if path.is_dir():
        for relative in _names(path):
            yield os.fsencode(relative)
            yield from _of_file(path / relative, method)
    elif path.is_file():
        yield from _of_file(path, method)
    else:
        raise BadDataset(f"fingerprint: {path}", "is no file or directory.")


def _names(directory: Path) -> list[str]:
    """Relative paths of all files, sorted; links to directories are not followed."""
    found = []
    for parent, _, names in os.walk(directory):
        found += [os.path.relpath(os.path.join(parent, name), directory) for name in names]
    return sorted(found)


def _of_file(path: Path, method: Method) -> Iterator[bytes]:
    try:
        if method is Method.stat:
            status = path.stat()
            yield f"{status.st_size} {status.st_mtime_ns}".encode()
            return
        digest = _new(method)
        with path.open("rb") as reader:
            while chunk := reader.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise BadDataset(f"fingerprint: {path}", f"cannot be read ({error.strerror or error}).") from error
    yield digest.digest()


def _of_array(source: Any) -> Iterator[bytes]:
    """Type, shape, and values in C order."""
    kind, shape, values = _tensor(source) if hasattr(source, "detach") else _array(source)
    yield f"{kind} {'x'.join(map(str, shape))}".encode()
    yield values


def _array(source: Any) -> tuple[str, tuple[int, ...], Any]:
    array = np.asarray(source)
    if array.dtype.hasobject:
        raise BadDataset(f"fingerprint: an array of {array.dtype}", "holds objects, whose bytes are addresses.")
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    flat = np.ascontiguousarray(array).reshape(-1)
    return array.dtype.name, array.shape, flat.view(np.uint8).data if flat.size else b""


def _tensor(source: Any) -> tuple[str, tuple[int, ...], Any]:
    torch = sys.modules["torch"]  # who has a tensor has imported it
    tensor = source.detach().cpu().contiguous()
    kind = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    # As bytes: numpy knows no bfloat16.
    return kind, shape, tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b""


__all__ = ["BadDataset", "Method", "declared", "fingerprint"]
