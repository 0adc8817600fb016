"""Reads a checkpoint and verifies every byte of it on the way.

A checkpoint's tensors lie in as many files as there were ranks, whole or, if they were sharded, in pieces. Who reads
need not be as many: `read` gives all of them put together, `read_slices` the parts of them that one rank wants.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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

__all__ = ["Damage", "Stored", "check_sizes", "read", "read_manifest", "read_slices", "shapes", "verify"]

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


def shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """`group/name` of all tensors of the state -> the shape of the whole."""
    return {key: _full_shape(pieces[0][1]) for key, pieces in _pieces(manifest.files).items() if _group(key) in GROUPS}


def read(
    storage: Storage,
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    groups: Sequence[str] = GROUPS,
    boxes: Mapping[str, Box] | None = None,
    threads: int = 2,
) -> Stored:
    """The whole checkpoint, as rank `rank` of `world_size` needs it; of the tensors, those in `groups`, and of those in
    `boxes` ("model/fc.weight" -> begin and end in each dimension) this part: saved tensors and pieces that have no
    share in it are not read.

    Raises CheckpointCorrupt naming the file. Every byte that is read is hashed as it arrives, pieces of tensors as
    wholes, and nothing is given out before all of it is right. The number of workers need not be that which wrote it.
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
    texts = {file.path: _read_text(storage, file) for file in wanted if not file.tensors}
    pieces = _pieces(wanted)
    cut = {key: box for key, box in (boxes or {}).items() if key in pieces}
    found = _read_tensors(storage, [file for file in wanted if file.path not in texts], pieces, cut, threads)
    tensors = {
        group: {key.partition("/")[2]: tensor for key, tensor in found.items() if _group(key) == group}
        for group in (*GROUPS, _OWN, _SIDE)
    }
    tensors["model"] |= tensors.pop(_OWN)
    side = {key.removeprefix(f"{_SIDE}/"): tensor.numpy().tobytes() for key, tensor in tensors.pop(_SIDE).items()}
    shared = json.loads(texts[STATE])
    return Stored(
        manifest=manifest,
        snapshot=Snapshot(
            tensors=tensors, tree=shared["tree"], files=side,
            parts={key: _full_shape(pieces[key][0][1]) for key in cut},
        ),
        progress=shared["progress"],
        rank=unpack(json.loads(texts[mine])["content"], from_inline),
        why=() if is_same_world else _lost(manifest),
    )  # fmt: skip


def read_slices(
    storage: Storage, manifest: Manifest, wanted: Mapping[str, Sequence[slice]], *, threads: int = 2
) -> dict[str, torch.Tensor]:
    """Parts of tensors, for a rank that holds only these: name ("model/fc.weight") -> one slice per dimension, none for
    the whole tensor. Slices have no steps. Example: {"model/fc.weight": (slice(0, 5), slice(None))}.

    Reads, and verifies, no more than the saved tensors or pieces of tensors that overlap. Raises KeyError for a name
    that is not in the checkpoint, CheckpointCorrupt as `read` does.
    """
    check_sizes(storage, manifest)
    known = _pieces(manifest.files)
    pieces = {key: known[key] for key in wanted}
    boxes = {key: _box(slices, _full_shape(pieces[key][0][1])) for key, slices in wanted.items()}
    files = {file.path: file for each in pieces.values() for file, _ in each}
    return _read_tensors(storage, list(files.values()), pieces, boxes, threads)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """What one saved tensor, or piece of one, gives to a tensor that is to be read."""

    into: tensorfile.Into
    temporary: torch.Tensor | None = None
    """Memory for the whole piece, if its share does not lie together in the result."""
    copy: Callable[[torch.Tensor], object] | None = None


def _read_tensors(
    storage: Storage, files: Sequence[FileEntry], pieces: _Pieces, boxes: Mapping[str, Box], threads: int
) -> dict[str, torch.Tensor]:
    """The tensors in `pieces`, of those in `boxes` that part. Each is read straight to where it shall be."""
    results: dict[str, torch.Tensor] = {}
    shares: dict[tuple[str, str], Callable[[], _Share]] = {}
    needed: dict[str, set[str]] = {file.path: set() for file in files}
    for key, each in pieces.items():
        for file, entry in each:
            tensorfile.check_type(entry, file, storage.uri())
        first = each[0][1]
        box = boxes.get(key, _box((), _full_shape(first)))
        overlaps = [(file, entry, _overlap(box, _box_of(entry))) for file, entry in each]
        filled = sum(_volume(inner) for *_, inner in overlaps if inner is not None)
        if filled != _volume(box):  # pieces of one tensor never overlap each other: the plan divides it
            raise CheckpointCorrupt(storage.uri(), key, f"{_volume(box)} elements", f"{filled}")
        results[key] = tensorfile.empty([end - begin for begin, end in box], first.dtype)
        for file, entry, inner in overlaps:
            if inner is not None:
                shares[file.path, entry.name] = partial(_share, results[key], box, entry, inner)
                needed[file.path].add(entry.name)
            elif key not in boxes:  # empty, and to be verified like all the rest
                needed[file.path].add(entry.name)
    parts = [part for file in files for part in _parts_of(storage, file, needed[file.path])]
    for _ in _all(lambda part: _read_part(storage, part, shares), parts, threads):
        pass
    return results


def _share(result: torch.Tensor, box: Box, entry: TensorEntry, inner: Box) -> _Share:
    piece = _box_of(entry)
    if inner[1:] == piece[1:] == box[1:]:  # whole rows: they follow each other here and there
        row_bytes = _volume(inner[1:]) * result.element_size()
        here, there = (0, 0) if not inner else (inner[0][0] - box[0][0], inner[0][0] - piece[0][0])
        length = _volume(inner) * result.element_size()
        at = here * row_bytes
        return _Share(into=tensorfile.Into(tensorfile.data(result)[at : at + length], there * row_bytes))
    temporary = tensorfile.empty(entry.shape, entry.dtype)

    def copy(verified: torch.Tensor) -> None:
        result[_within(inner, box)] = verified[_within(inner, piece)]

    return _Share(into=tensorfile.Into(tensorfile.data(temporary)), temporary=temporary, copy=copy)


def _parts_of(storage: Storage, file: FileEntry, names: Collection[str] | None = None) -> list[tensorfile.Part]:
    """What is read in one go: of an object store whole files, as its streams know no other beginning."""
    if not storage.is_local:
        return tensorfile.parts(file)
    is_whole = names is None or len(names) == len(file.tensors)
    return tensorfile.parts(file, _PART_BYTES, None if is_whole else names)


def _read_part(storage: Storage, part: tensorfile.Part, shares: Mapping[tuple[str, str], Callable[[], _Share]]) -> None:
    taken: list[_Share] = []

    def into(entry: TensorEntry) -> tensorfile.Into | None:
        if (share := shares.get((part.file.path, entry.name))) is None:
            return None
        taken.append(share())
        return taken[-1].into

    _opened(storage, part.file, lambda source: tensorfile.read_part(source, part, storage.uri(), into))
    for share in taken:
        if share.copy is not None and share.temporary is not None:
            share.copy(share.temporary)


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


def _lost(manifest: Manifest) -> tuple[str, ...]:
    if any(file.path.startswith(f"{_OWN}/") for file in manifest.files):
        return ("each worker had buffers of its own, and all go on with the first one's",)
    return ()


# -- boxes: where a piece lies in the whole tensor, as (begin, end) per dimension -------------------------------

Box = tuple[tuple[int, int], ...]
_Pieces = Mapping[str, Sequence[tuple[FileEntry, TensorEntry]]]


def _pieces(files: Sequence[FileEntry]) -> dict[str, list[tuple[FileEntry, TensorEntry]]]:
    """folder/name -> all that was saved of it."""
    found: dict[str, list[tuple[FileEntry, TensorEntry]]] = {}
    for file in files:
        for entry in file.tensors:
            found.setdefault(f"{file.path.split('/')[0]}/{entry.name}", []).append((file, entry))
    return found


def _group(key: str) -> str:
    return key.partition("/")[0]


def _box(slices: Sequence[slice], shape: Sequence[int]) -> Box:
    missing = [slice(None)] * (len(shape) - len(slices))
    return tuple(part.indices(size)[:2] for part, size in zip([*slices, *missing], shape, strict=True))


def _box_of(entry: TensorEntry) -> Box:
    offsets = entry.offsets or (0,) * len(entry.shape)
    return tuple((offset, offset + size) for offset, size in zip(offsets, entry.shape, strict=True))


def _full_shape(entry: TensorEntry) -> tuple[int, ...]:
    return entry.shape if entry.full_shape is None else entry.full_shape


def _overlap(one: Box, other: Box) -> Box | None:
    """None if they share no element; two scalars share theirs."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(begin < end for begin, end in both) else None


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(begin - origin, end - origin) for (begin, end), (origin, _) in zip(inner, outer, strict=True))


def _volume(box: Box) -> int:
    count = 1
    for begin, end in box:
        count *= max(0, end - begin)
    return count
