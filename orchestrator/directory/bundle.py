"""A run as one bundle: its directory with a fresh record.json and metrics.csv, and a manifest of all of it.

`<run>/…` in a `.tar.gz`, a `.tar` or a directory. The manifest is written last and names every file with size and
SHA-256, so a bundle that was cut is no bundle. Nothing of a bundle is believed before all of it was read: it is
unpacked beside the runs' directories, compared with its manifest, moved to its place, and at last written to the
database in one transaction. What a crash leaves is removed by the next import of the same run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from orchestrator.backends.storage import Storage, UnsafePath
from orchestrator.directory import layout, metrics_file, record, removal
from orchestrator.errors import NotFound, UserError
from orchestrator.records import RunStatus
from orchestrator.store.errors import BadRecord, RunIsThere
from orchestrator.store.names import is_run_id, run_directory
from orchestrator.store.portable import WITH_LEDGER
from orchestrator.store.store import Store

MANIFEST = "manifest.json"
PROTOCOL = 1
BLOCK = 1 << 20
FRESH = (layout.RECORD, layout.METRICS)
"""Written from the database for the bundle, whatever the directory has."""


class BadBundle(UserError, ValueError):
    """A file that is no bundle, or a damaged one. Nothing was imported."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"{self.path} cannot be imported: {self.why} Nothing was changed."


class Watcher(Protocol):
    """Who is told how far it is; returns at once."""

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None: ...


def unwatched(what: str, done_bytes: int, total_bytes: int) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundled:
    """What was written."""

    run: str
    name: str
    path: str
    files: int
    points: int
    size_bytes: int
    """Of the files in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import did."""

    run: str
    name: str
    directory: str
    files: int
    points: int
    is_new: bool
    """False: the same run was here already."""
    missing_parents: tuple[str, ...] = ()
    """Runs it descends from that are not here."""


class StillRunning(UserError):
    """A run that has not ended has no bundle."""

    def __init__(self, run: str, status: str) -> None:
        super().__init__(run, status)
        self.run, self.status = run, status

    def __str__(self) -> str:
        return (
            f"Run {self.run} is {self.status}: it can be exported when it has ended. `orc cancel {self.run}` ends it."
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    store: Store, run: str, target: Path, *, with_checkpoints: bool = True, watch: Watcher = unwatched
) -> Bundled:
    """The run as a bundle at `target`, which appears when it is complete. Raises NotFound, StillRunning."""
    target = target.expanduser().absolute()
    if target.exists():
        raise UserError(f"{target} exists already: give another name.")
    if not target.parent.is_dir():
        raise UserError(f"There is no directory {target.parent}.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with tempfile.TemporaryFile(dir=target.parent) as points:
            found, count = _read_store(store, run, points, watch)
            with _opened(part, target.name, run) as sink:
                _fill(sink, found, points, with_checkpoints, watch)
        part.rename(target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
    return Bundled(
        run=run, name=found["run"]["name"], path=str(target), files=len(sink.manifest), points=count,
        size_bytes=sum(entry["size_bytes"] for entry in sink.manifest.values()),
    )  # fmt: skip


def _read_store(store: Store, run: str, points: IO[bytes], watch: Watcher) -> tuple[record.Record, int]:
    """The record, and how many points were written to `points`: both of one moment."""
    with store.snapshot(run) as snapshot:
        status = RunStatus(snapshot.record["run"]["status"])
        if not status.is_terminal:
            raise StillRunning(run, status)
        for piece in metrics_file.lines(snapshot.chunks()):
            points.write(piece)
            watch(layout.METRICS, points.tell(), 0)
        ledger = snapshot.ledger()
        found = {**snapshot.record, "protocol": WITH_LEDGER, "ledger": ledger} if ledger else snapshot.record
        return found, snapshot.points


def _fill(sink: _Sink, found: record.Record, points: IO[bytes], with_checkpoints: bool, watch: Watcher) -> None:
    described, size = record.encode(record.movable(found)), points.tell()
    points.seek(0)
    sink.add(layout.RECORD, io.BytesIO(described), len(described))
    sink.add(layout.METRICS, points, size)
    url = found["run"]["directory"]
    directory = Storage(url) if url else None
    files = [
        (path, size)
        for path, size in (directory.files() if directory else ())
        if path not in (*FRESH, MANIFEST) and (with_checkpoints or not path.startswith(f"{layout.CHECKPOINTS}/"))
    ]
    done, total = 0, sum(size for _, size in files)
    for path, size in files:
        watch(path, done, total)
        assert directory is not None
        with directory.open_input(path) as source:
            sink.add(path, source, size)
        done += size
    about = {
        "protocol": PROTOCOL, "run": found["run"]["id"], "with_checkpoints": with_checkpoints, "files": sink.manifest,
    }  # fmt: skip
    text = (json.dumps(about, indent=2) + "\n").encode()
    sink.put(MANIFEST, io.BytesIO(text), len(text))


class _Hashing:
    """A file that is read once, from its beginning, and hashed on the way."""

    def __init__(self, source: Any) -> None:
        self._source, self._hash = source, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        data: bytes = self._source.read(count)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class _Sink:
    """Where a bundle is written. `manifest` has what was added so far."""

    def __init__(self) -> None:
        self.manifest: dict[str, dict[str, Any]] = {}

    def add(self, path: str, source: Any, size: int) -> None:
        hashing = _Hashing(source)
        self.put(path, hashing, size)
        self.manifest[path] = {"size_bytes": size, "sha256": hashing.hexdigest()}

    def put(self, path: str, source: Any, size: int) -> None:
        raise NotImplementedError


class _TarSink(_Sink):
    def __init__(self, tar: tarfile.TarFile, run: str) -> None:
        super().__init__()
        self._tar, self._run = tar, run

    def put(self, path: str, source: Any, size: int) -> None:
        member = tarfile.TarInfo(f"{self._run}/{path}")
        member.size, member.mtime, member.mode = size, int(time.time()), 0o644
        self._tar.addfile(member, source)  # raises when there is less than `size` of it


class _DirectorySink(_Sink):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self._storage = Storage(str(root))

    def put(self, path: str, source: Any, size: int) -> None:
        with self._storage.open_output(path) as output:
            _copy(source, output, size)


def _copy(source: Any, output: Any, size: int) -> None:
    """Exactly so many bytes. Raises OSError when there are fewer."""
    left = size
    while left:
        data = source.read(min(left, BLOCK))
        if not data:
            raise OSError(f"the file became shorter by {left} bytes while it was read")
        output.write(data)
        left -= len(data)


@contextmanager
def _opened(part: Path, name: str, run: str) -> Iterator[_Sink]:
    if not name.endswith((".tar.gz", ".tgz", ".tar")):
        yield _DirectorySink(part)
        return
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as raw:
        # Weights hardly shrink, whatever is spent on them.
        with (
            tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT)
            if name.endswith(".tar")
            else tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1, format=tarfile.PAX_FORMAT)
        ) as tar:
            yield _TarSink(tar, run)
        raw.flush()
        os.fsync(raw.fileno())


# -- reading -----------------------------------------------------------------------------------------------------------


def read(store: Store, source: Path, storage_url: str, *, watch: Watcher = unwatched) -> Imported:
    """Brings the bundle's run into the store and its files under `storage_url`. Raises BadBundle, RunIsThere."""
    source = source.expanduser().absolute()
    try:
        return _read(store, source, storage_url, watch)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadBundle(str(source), f"it is no whole archive ({error}).") from error


def _read(store: Store, source: Path, storage_url: str, watch: Watcher) -> Imported:
    members = _members(source)
    first = next(members, None)
    if first is None:
        raise BadBundle(str(source), "there is nothing in it.")
    run = first.run
    lock = f"import of {run}"
    if not store.try_lock(lock):
        raise UserError(f"Somebody else is importing run {run} right now.")
    try:
        with _staging(Storage(storage_url), run) as staged:
            found, manifest = _unpacked(source, run, itertools.chain([first], members), staged, watch)
            return _take(store, source, found, manifest, staged, storage_url, watch)
    finally:
        store.unlock(lock)


@dataclass(frozen=True, slots=True)
class _Member:
    run: str
    path: str
    size: int
    source: Any


def _members(source: Path) -> Iterator[_Member]:
    """The files of a bundle, in its order, each to be read before the next one is asked for. Raises BadBundle."""
    if source.is_dir():
        yield from _members_of_directory(source)
    elif source.exists():
        yield from _members_of_tar(source)
    else:
        raise BadBundle(str(source), "there is no such file.")


def _members_of_tar(source: Path) -> Iterator[_Member]:
    with tarfile.open(source, "r|*") as tar:
        for member in tar:
            if member.isdir():
                continue
            run, _, path = member.name.partition("/")
            content = tar.extractfile(member) if member.isreg() and stays_inside(path) else None
            if content is None or not is_run_id(run):
                raise BadBundle(str(source), f"{member.name!r} is no file of a run.")
            yield _Member(run, path, member.size, content)


def stays_inside(path: str) -> bool:
    """Whether a path of a bundle names a file below the run's directory, on any storage.

    `tarfile.data_filter` would say it, too, but only from Python 3.11.4 on.
    """
    parts = path.split("/")
    return not {"", ".", ".."} & set(parts) and not {"\\", "\0"} & set(path)


def _members_of_directory(source: Path) -> Iterator[_Member]:
    storage = Storage(str(source))
    try:
        run = str(json.loads(storage.read_bytes(MANIFEST))["run"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise BadBundle(str(source), f"it has no readable {MANIFEST}.") from error
    if not is_run_id(run):
        raise BadBundle(str(source), f"{run!r} is no id of a run.")
    for path, size in sorted(storage.files(), key=lambda file: file[0] == MANIFEST):
        with storage.open_input(path) as content:
            yield _Member(run, path, size, content)


def _unpacked(
    source: Path, run: str, members: Iterable[_Member], staged: Storage, watch: Watcher
) -> tuple[record.Record, Mapping[str, Any]]:
    """Record and manifest, when all files lie in `staged` and are what the manifest says. Raises BadBundle."""
    found: dict[str, dict[str, Any]] = {}
    done = 0
    for member in members:
        if member.run != run or member.path in found:
            raise BadBundle(str(source), f"{member.run}/{member.path} is there twice or of another run.")
        watch(member.path, done, 0)
        hashing = _Hashing(member.source)
        try:
            with staged.open_output(member.path) as output:
                _copy(hashing, output, member.size)
        except UnsafePath as error:
            raise BadBundle(str(source), str(error)) from error
        found[member.path] = {"size_bytes": member.size, "sha256": hashing.hexdigest()}
        done += member.size
    if found.pop(MANIFEST, None) is None:
        raise BadBundle(str(source), "its manifest is missing: the file was cut, or never complete.")
    try:
        about = json.loads(staged.read_bytes(MANIFEST))
        protocol, manifest = about["protocol"], about["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadBundle(str(source), f"its manifest cannot be read ({error}).") from error
    if not isinstance(manifest, dict):
        raise BadBundle(str(source), "its manifest names no files.")
    if protocol != PROTOCOL:
        raise BadBundle(str(source), f"it has protocol {protocol}, this version speaks {PROTOCOL}.")
    for path in sorted({*found, *manifest, *FRESH}):
        if found.get(path) != manifest.get(path) or path not in found:
            raise BadBundle(str(source), f"{path} is not what its manifest says.")
    try:
        described = record.decode(staged.read_bytes(layout.RECORD))
        status = RunStatus(described["run"]["status"])
    except (ValueError, KeyError) as error:  # BadRecord among them
        raise BadBundle(str(source), f"{error}") from error
    if described["run"]["id"] != run or not status.is_terminal:
        raise BadBundle(str(source), f"its record is not that of run {run} at its end.")
    staged.delete(MANIFEST)
    return described, manifest


def _take(
    store: Store, source: Path, found: record.Record, manifest: Mapping[str, Any], staged: Storage, storage_url: str,
    watch: Watcher,
) -> Imported:  # fmt: skip
    run, name = found["run"]["id"], found["run"]["name"]
    points = sum(row["count"] for row in found["summaries"])
    directory = run_directory(storage_url, found["run"]["experiment"], run)
    here = _found_here(store, run)
    if here is not None:
        if here[:2] != (record.likeness(found), manifest[layout.METRICS]["sha256"]):
            raise RunIsThere(run)
        return Imported(run=run, name=name, directory=here[2], files=0, points=points, is_new=False)
    if store.half_removed(run) is not None:
        raise RunIsThere(run, is_half_removed=True)
    watch("the database", 0, 0)
    was_there = _put(source, staged, directory, manifest)
    try:
        with Storage(directory).open_input(layout.METRICS) as metrics:
            missing = store.restore_run(record.placed(found, directory), metrics_file.read(metrics))
    except BaseException as error:
        if not was_there:
            removal.remove(run, directory)
        if isinstance(error, BadRecord):
            raise BadBundle(str(source), str(error)) from error
        raise
    return Imported(
        run=run, name=name, directory=directory, files=len(manifest), points=points, is_new=True,
        missing_parents=missing,
    )  # fmt: skip


def _found_here(store: Store, run: str) -> tuple[str, str, str] | None:
    """What the run is that has this id here: its likeness, the hash of its points, its directory."""
    try:
        with store.snapshot(run) as snapshot:
            points = hashlib.sha256()
            for piece in metrics_file.lines(snapshot.chunks()):
                points.update(piece)
            return record.likeness(snapshot.record), points.hexdigest(), snapshot.record["run"]["directory"]
    except NotFound:
        return None


def _put(source: Path, staged: Storage, directory: str, manifest: Mapping[str, Any]) -> bool:
    """Moves the files to their place; True when there were some before, which an import was killed over or a removal
    kept. Raises BadBundle when these are others.
    """
    target = Storage(directory)
    before = dict(target.files())
    for path, size in before.items():
        entry = manifest.get(path)
        if path not in (*FRESH, layout.IDENTITY, layout.README) and entry and entry["size_bytes"] != size:
            raise BadBundle(str(source), f"{target.uri(path)} exists, belongs to no run here and is another file.")
    if target.is_local and staged.is_local and not os.path.lexists(target.uri()):
        Path(target.uri()).parent.mkdir(parents=True, exist_ok=True)
        os.rename(staged.uri(), target.uri())
        return False
    for path in manifest:
        with staged.open_input(path) as content, target.open_output(path) as output:
            shutil.copyfileobj(content, output, BLOCK)
    return bool(before)


@contextmanager
def _staging(storage: Storage, run: str) -> Iterator[Storage]:
    """Where files wait until all of them are verified: on the storage's own disk, so that they need only be renamed."""
    if storage.is_local:
        place = Path(storage.uri()) / f".import-{run}"
        shutil.rmtree(place, ignore_errors=True)  # left by one that was killed
        place.mkdir(parents=True, mode=0o755)
    else:
        place = Path(tempfile.mkdtemp(prefix="orc-import-"))
    try:
        yield Storage(str(place))
    finally:
        shutil.rmtree(place, ignore_errors=True)
