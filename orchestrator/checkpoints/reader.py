"""Reads a checkpoint and verifies every byte of it on the way.

A checkpoint's tensors lie in as many files as there were ranks, whole or, if they were sharded, in pieces. Who reads
need not be as many: `read` gives all of them put together, `read_slices` the parts of them that one rank wants.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import xxhash

from orchestrator.backends.storage import Storage, UnsafePath
from orchestrator.checkpoints import tensorfile
from orchestrator.checkpoints.catalog import read_manifest
from orchestrator.checkpoints.manifest import MANIFEST, STATE, FileEntry, Manifest, TensorEntry, rank_file
from orchestrator.checkpoints.state import GROUPS, Snapshot
from orchestrator.checkpoints.tree import from_inline, unpack
from orchestrator.errors import CheckpointCorrupt

__all__ = ["Damage", "Stored", "check_sizes", "read", "read_manifest", "read_slices", "verify"]

_PART_BYTES = 32 << 20
"""What one thread reads at a time, at least: enough that opening the file again does not count."""
_OWN = "rank"
"""Folder of the tensors that a rank has otherwise than rank 0: one file per rank."""
_SIDE = "side"
"""Folder of the bytes that the user gave."""

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Called now and then with the bytes read so far and the bytes there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A checkpoint in memory."""

    manifest: Manifest
    snapshot: Snapshot
    progress: Mapping[str, Any]
    rank: Mapping[str, Any]
    """What this rank wrote; what rank 0 wrote, if the number of workers is another."""
    why: tuple[str, ...] = ()
    """What could not be given back as it was: the reasons why training on cannot be exact. Empty if all is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing in a stored checkpoint that is not as its manifest says."""

    file: str
    tensor: str
    """"" if it is the whole file, its head or its length."""
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.tensor}" if self.tensor else self.file
        return f"{where}: {self.found}, the manifest says {self.expected}"


@dataclass(slots=True)
class _Contents:
    """What was read of some files, by path."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def read(
    storage: Storage,
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    groups: Sequence[str] = GROUPS,
    threads: int = 2,
) -> Stored:
    """The whole checkpoint, as rank `rank` of `world_size` needs it; of the tensors, those in `groups`.

    Raises CheckpointCorrupt naming the file. Every byte is hashed as it arrives, and nothing is given out before all of
    it is right. The number of workers need not be that which wrote it.
    """
    check_sizes(storage, manifest)
    is_same_world = world_size == manifest.world_size
    mine = rank_file(rank if is_same_world else 0)
    own = f"{_OWN}/{_OWN}-{rank + 1:05d}-of-{world_size:05d}.safetensors" if is_same_world else ""
    wanted = [
        file
        for file in manifest.files
        if file.path in (STATE, mine, own) or file.path.split("/")[0] in (*groups, _SIDE)
    ]
    for needed in (STATE, mine):
        if not any(file.path == needed for file in wanted):
            raise CheckpointCorrupt(storage.uri(), MANIFEST, f"an entry for {needed}", "none")
    contents = _read_files(storage, wanted, threads)
    tensors = {group: _put_together(storage, wanted, group, contents) for group in GROUPS}
    for name, tensor in contents.tensors.get(own, {}).items():
        tensors["model"][name] = tensor
    shared = json.loads(contents.texts[STATE])
    return Stored(
        manifest=manifest,
        snapshot=Snapshot(tensors=tensors, tree=shared["tree"], files=_side_files(wanted, contents)),
        progress=shared["progress"],
        rank=unpack(json.loads(contents.texts[mine])["content"], from_inline),
        why=() if is_same_world else _lost(manifest),
    )


def read_slices(
    storage: Storage, manifest: Manifest, wanted: Mapping[str, Sequence[slice]], *, threads: int = 2
) -> dict[str, torch.Tensor]:
    """Parts of tensors, for a rank that holds only these: name ("model/fc.weight") -> one slice per dimension, none for
    the whole tensor. Slices have no steps. Example: {"model/fc.weight": (slice(0, 5), slice(None))}.

    Reads, and verifies, no more than the saved tensors or pieces of tensors that overlap. Raises KeyError for a name
    that is not in the checkpoint, CheckpointCorrupt as `read` does.
    """
    check_sizes(storage, manifest)
    pieces = _pieces(manifest.files)
    results = {}
    overlapping: dict[str, set[str]] = {}
    boxes = {}
    for name, slices in wanted.items():
        boxes[name] = box = _box(slices, _full_shape(pieces[name][0][1]))
        for file, entry in pieces[name]:
            if _overlap(box, _box_of(entry)) is not None:
                overlapping.setdefault(file.path, set()).add(entry.name)
    files = [file for file in manifest.files if file.path in overlapping]
    parts = [part for file in files for part in _parts_with(storage, file, overlapping[file.path])]
    found: dict[tuple[str, str], torch.Tensor] = {}
    for part, tensors in zip(parts, _all(lambda part: _read_part(storage, part), parts, threads), strict=True):
        found |= {(part.file.path, name): tensor for name, tensor in tensors.items()}
    for name, box in boxes.items():
        entries = [(entry, found.get((file.path, entry.name))) for file, entry in pieces[name]]
        results[name] = _assembled(storage, name, box, entries)
    return results


def check_sizes(storage: Storage, manifest: Manifest) -> None:
    """Raises CheckpointCorrupt for a missing, shortened or lengthened file, without reading any."""
    for file in manifest.files:
        found = _present(storage, file, storage.size_bytes)
        if found != file.size_bytes:
            raise CheckpointCorrupt(storage.uri(), file.path, f"{file.size_bytes} bytes", f"{found} bytes")


def verify(storage: Storage, manifest: Manifest, *, threads: int = 2, progress: Progress | None = None) -> list[Damage]:
    """All that is wrong with it, in the manifest's order; empty if nothing is. Reads every file of every rank, and
    changes none. Raises OSError when the storage does not answer: that is no damage."""
    parts = [part for file in manifest.files for part in _parts_of(storage, file)]
    total, done = manifest.size_bytes, 0
    damages = []
    for part, found in zip(parts, _all(lambda part: _damages(storage, part), parts, threads), strict=True):
        damages += found
        done += part.size_bytes
        if progress is not None:
            progress(done, total)
    return damages


def _damages(storage: Storage, part: tensorfile.Part) -> list[Damage]:
    file = part.file
    try:
        found = []
        size = _present(storage, file, storage.size_bytes)
        if part.is_first and size != file.size_bytes:
            length = f"{file.size_bytes} bytes", f"{size} bytes"
            found.append(Damage(file=file.path, tensor="", expected=length[0], found=length[1]))
        wrong = _opened(storage, file, lambda source: tensorfile.differences(source, part))
    except CheckpointCorrupt as gone:
        if not part.is_first:  # said once is enough
            return []
        return [Damage(file=file.path, tensor="", expected=gone.expected, found=gone.found)]
    told = {(damage.tensor, damage.expected) for damage in found}
    found += [
        Damage(file=file.path, tensor=each.tensor, expected=each.expected, found=each.found)
        for each in wrong
        if (each.tensor, each.expected) not in told
    ]
    return found


# -- files ---------------------------------------------------------------------------------------------------


def _read_files(storage: Storage, files: Sequence[FileEntry], threads: int) -> _Contents:
    contents = _Contents()
    parts = [part for file in files if file.tensors for part in _parts_of(storage, file)]
    for file in files:
        if file.tensors:
            contents.tensors[file.path] = {}
        else:
            contents.texts[file.path] = _read_text(storage, file)
    for part, tensors in zip(parts, _all(lambda part: _read_part(storage, part), parts, threads), strict=True):
        contents.tensors[part.file.path].update(tensors)
    return contents


def _parts_of(storage: Storage, file: FileEntry) -> list[tensorfile.Part]:
    """What is read in one go: of an object store whole files, as its streams know no other beginning."""
    return tensorfile.parts(file, _PART_BYTES if storage.is_local else 0)


def _parts_with(storage: Storage, file: FileEntry, names: set[str]) -> list[tensorfile.Part]:
    """As few bytes of the file as hold the named tensors."""
    if not storage.is_local:
        return tensorfile.parts(file)
    each = tensorfile.parts(file, 1)
    return [part for part in each if part.is_first or any(tensor.name in names for tensor in part.tensors)]


def _read_part(storage: Storage, part: tensorfile.Part) -> dict[str, torch.Tensor]:
    return _opened(storage, part.file, lambda source: tensorfile.read_part(source, part, storage.uri()))


def _read_text(storage: Storage, file: FileEntry) -> bytes:
    data: bytes = _present(storage, file, storage.read_bytes)
    found = xxhash.xxh3_128_hexdigest(data)
    if found != file.head_xxh3:
        raise CheckpointCorrupt(storage.uri(), file.path, file.head_xxh3, found)
    return data


def _opened(storage: Storage, file: FileEntry, action: Callable[[Any], Result]) -> Result:
    def opened(path: str) -> Result:
        with storage.open_input(path) as source:
            return action(source)

    return _present(storage, file, opened)


def _present(storage: Storage, file: FileEntry, action: Callable[[str], Result]) -> Result:
    try:
        return action(file.path)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(storage.uri(), file.path, f"{file.size_bytes} bytes", "no file") from error
    except UnsafePath as error:
        raise CheckpointCorrupt(storage.uri(), MANIFEST, "names inside the checkpoint", file.path) from error


def _all(
    action: Callable[[tensorfile.Part], Result], parts: Sequence[tensorfile.Part], threads: int
) -> Iterable[Result]:
    """The results in order. Reading and hashing leave the interpreter's lock alone, so threads are worth it. After the
    first failure no part is begun."""
    if threads < 2 or len(parts) < 2:
        yield from map(action, parts)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="orc-checkpoint-reader") as pool:
        futures = [pool.submit(action, part) for part in parts]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# -- what is in them -----------------------------------------------------------------------------------------


def _side_files(files: Sequence[FileEntry], contents: _Contents) -> dict[str, bytes]:
    return {
        file.path.removeprefix(f"{_SIDE}/"): b"".join(
            tensor.numpy().tobytes() for tensor in contents.tensors[file.path].values()
        )
        for file in files
        if file.path.startswith(f"{_SIDE}/")
    }


def _lost(manifest: Manifest) -> tuple[str, ...]:
    if any(file.path.startswith(f"{_OWN}/") for file in manifest.files):
        return ("each worker had buffers of its own, and all go on with the first one's",)
    return ()


def _put_together(storage: Storage, files: Sequence[FileEntry], group: str, contents: _Contents) -> dict[str, Any]:
    """A group's tensors, whole; those of all ranks' files in one."""
    whole: dict[str, torch.Tensor] = {}
    split: dict[str, list[tuple[TensorEntry, torch.Tensor | None]]] = {}
    for file in files:
        if not file.path.startswith(f"{group}/"):
            continue
        for entry in file.tensors:
            tensor = contents.tensors[file.path][entry.name]
            if entry.full_shape is None:
                whole[entry.name] = tensor
            else:
                split.setdefault(entry.name, []).append((entry, tensor))
    for name, pieces in split.items():
        whole[name] = _assembled(storage, f"{group}/{name}", _box((), _full_shape(pieces[0][0])), pieces)
    return whole


# -- boxes: where a piece lies in the whole tensor, as (begin, end) per dimension -------------------------------

_Box = tuple[tuple[int, int], ...]


def _pieces(files: Sequence[FileEntry]) -> dict[str, list[tuple[FileEntry, TensorEntry]]]:
    """group/name -> all that was saved of it."""
    found: dict[str, list[tuple[FileEntry, TensorEntry]]] = {}
    for file in files:
        group = file.path.split("/")[0]
        for entry in file.tensors if group in GROUPS else ():
            found.setdefault(f"{group}/{entry.name}", []).append((file, entry))
    return found


def _assembled(
    storage: Storage, name: str, box: _Box, pieces: Sequence[tuple[TensorEntry, torch.Tensor | None]]
) -> torch.Tensor:
    """What lies in `box`, from the pieces that overlap it. A piece is None if it was not read."""
    first = pieces[0][0]
    shape = [end - begin for begin, end in box]
    if len(pieces) == 1 and pieces[0][1] is not None and box == _box_of(first):
        return pieces[0][1]
    result = torch.empty(shape, dtype=tensorfile.TYPES[first.dtype])
    filled = 0
    for entry, tensor in pieces:
        inner = _overlap(box, _box_of(entry))
        if inner is None or tensor is None:
            continue
        result[_within(inner, box)] = tensor[_within(inner, _box_of(entry))]
        filled += _volume(inner)
    if filled != _volume(box):  # pieces of one tensor never overlap each other: the plan divides it
        raise CheckpointCorrupt(storage.uri(), name, f"{_volume(box)} elements", f"{filled}")
    return result


def _box(slices: Sequence[slice], shape: Sequence[int]) -> _Box:
    missing = [slice(None)] * (len(shape) - len(slices))
    return tuple(part.indices(size)[:2] for part, size in zip([*slices, *missing], shape, strict=True))


def _box_of(entry: TensorEntry) -> _Box:
    offsets = entry.offsets or (0,) * len(entry.shape)
    return tuple((offset, offset + size) for offset, size in zip(offsets, entry.shape, strict=True))


def _full_shape(entry: TensorEntry) -> tuple[int, ...]:
    return entry.shape if entry.full_shape is None else entry.full_shape


def _overlap(one: _Box, other: _Box) -> _Box | None:
    """None if they share no element; two scalars share theirs."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(begin < end for begin, end in both) else None


def _within(inner: _Box, outer: _Box) -> tuple[slice, ...]:
    return tuple(slice(begin - origin, end - origin) for (begin, end), (origin, _) in zip(inner, outer, strict=True))


def _volume(box: _Box) -> int:
    count = 1
    for begin, end in box:
        count *= max(0, end - begin)
    return count
