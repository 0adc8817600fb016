"""The source archive of a run: the same source gives the same bytes, and never a surprise of 100 MB."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.provenance.tree import Tree, is_secret_file

MOST_FILES = 20_000

CODE = frozenset({
    *(".py", ".pyi", ".pyx", ".pxd", ".ipynb", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".go", ".java"),
    *(".js", ".ts", ".sh", ".bash", ".r", ".jl", ".lua", ".sql", ".proto", ".yaml", ".yml", ".toml", ".cfg", ".ini"),
    *(".json", ".md", ".rst", ".txt", ".j2", ".mako", ".cmake", ".lock"),
})  # fmt: skip
"""What goes in first where not everything fits."""

DATA = frozenset({
    *(".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".gguf", ".npy", ".npz", ".h5", ".hdf5", ".pkl", ".joblib"),
    *(".parquet", ".arrow", ".feather", ".tfrecord", ".mmap", ".bin", ".db", ".sqlite", ".mdb", ".lmdb", ".dat"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".whl", ".so", ".o", ".a", ".pyc"),
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".mp3", ".mp4", ".wav", ".flac", ".avi"),
    *(".mkv", ".mov", ".dcm", ".nii"),
})  # fmt: skip
"""Left out unless tracked by git."""

MIN_SECRET_CHARACTERS = 8
"""Shorter secrets are not looked for in files: half the source would be left out for one that is called `test`."""

_PRIVATE_KEY = re.compile(rb"^-----BEGIN [A-Z ]*PRIVATE KEY-----\s*$", re.MULTILINE)


class Reason(StrEnum):
    """Why a file is not in the archive."""

    too_big = "too big"
    no_room = "no room"
    data = "data"
    secret = "secret"
    holds_secret = "holds a secret"
    link = "link out of the tree"
    special = "no plain file"
    unreadable = "unreadable"


LOUD = frozenset({Reason.too_big, Reason.no_room, Reason.holds_secret, Reason.link, Reason.unreadable})
"""Reasons that may surprise, and are warned about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    path: str
    size_bytes: int
    reason: Reason
    is_tracked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_bytes: int
    max_file_bytes: int
    max_files: int = MOST_FILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A file that might go into the archive."""

    name: str
    """In the archive."""
    file: Path
    root: Path
    is_tracked: bool
    size_bytes: int
    mode: int
    link: str = ""
    """Where a symbolic link points to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """What was written."""

    file: Path
    sha256: str
    """Of the tar inside: compressed bytes depend on the version of zlib."""
    files: int
    source_bytes: int
    size_bytes: int
    left_out: tuple[LeftOut, ...]

    def warning(self, most: int = 3) -> str:
        """What may surprise, in one sentence; empty without anything."""
        loud = sorted((out for out in self.left_out if out.reason in LOUD), key=lambda out: (-out.size_bytes, out.path))
        if not loud:
            return ""
        shown = [f"{out.path} ({out.size_bytes / 1e6:.1f} MB, {out.reason})" for out in loud[:most]]
        more = [f"{len(loud) - most} more"] if len(loud) > most else []
        what = "1 file is" if len(loud) == 1 else f"{len(loud)} files are"
        todo = "Name them in .gitignore or provenance.exclude, or raise provenance.max_mb and provenance.max_file_mb."
        return f"{what} not in the source archive: {', '.join(shown + more)}. {todo}"

    def document(self, most: int = 50) -> dict[str, Any]:
        """As plain values, with the biggest of what was left out."""
        biggest = sorted(self.left_out, key=lambda left: (-left.size_bytes, left.path))[:most]
        return {
            "file": self.file.name,
            "sha256": self.sha256,
            "files": self.files,
            "source_bytes": self.source_bytes,
            "size_bytes": self.size_bytes,
            "left_out": [{"path": b.path, "size_bytes": b.size_bytes, "reason": b.reason.value} for b in biggest],
            "lacks_tracked": any(left.is_tracked and left.reason in LOUD for left in self.left_out),
            "left_out_files": len(self.left_out),
            "left_out_bytes": sum(left.size_bytes for left in self.left_out),
        }


def candidates(trees: Iterable[Tree]) -> Iterator[Candidate]:
    """What is there of the listed files; those that were deleted but not committed are not."""
    for tree in trees:
        for listed in tree.files:
            file = tree.root / listed.path
            try:
                status = os.lstat(file)
                link = os.readlink(file) if stat.S_ISLNK(status.st_mode) else ""
            except OSError:
                continue
            yield Candidate(
                name=tree.prefix + listed.path, file=file, root=tree.root, is_tracked=listed.is_tracked,
                size_bytes=status.st_size, mode=status.st_mode, link=link,
            )  # fmt: skip


def select(found: Iterable[Candidate], limits: Limits) -> tuple[list[Candidate], list[LeftOut]]:
    """What is taken, by name, and what is not. Tracked files come first, code before the rest."""
    taken: list[Candidate] = []
    left: list[LeftOut] = []
    room = limits.max_bytes
    for candidate in sorted(found, key=_rank):
        reason = _objection(candidate, limits)
        if reason is None and (candidate.size_bytes > room or len(taken) >= limits.max_files):
            reason = Reason.no_room
        if reason is None:
            taken.append(candidate)
            room -= candidate.size_bytes
        else:
            left.append(_left(candidate, reason))
    return sorted(taken, key=lambda candidate: candidate.name), left


def write(directory: Path, trees: Iterable[Tree], limits: Limits, secrets: Sequence[str] = ()) -> Archive:
    """Writes `source-<sha12>.tar.gz` into the directory, which exists. Raises OSError.

    No archived file holds one of the secrets. Links are archived as links.
    """
    taken, left = select(candidates(trees), limits)
    needles = [secret.encode() for secret in secrets if len(secret) >= MIN_SECRET_CHARACTERS]
    partial = directory / f"source.{os.getpid()}.partial"
    count = total = 0
    try:
        with partial.open("wb") as raw, gzip.GzipFile("", "wb", 3, raw, mtime=0) as packed:
            hashing = _Hashing(packed)
            with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
                for candidate in taken:
                    reason, data = _content(candidate, limits, needles)
                    if reason is not None:
                        left.append(_left(candidate, reason))
                        continue
                    _add(tar, candidate, data)
                    count, total = count + 1, total + len(data)
        digest = hashing.sha256.hexdigest()
        file = directory / f"source-{digest[:12]}.tar.gz"
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    left.sort(key=lambda out: out.path)
    return Archive(
        file=file, sha256=digest, files=count, source_bytes=total, size_bytes=file.stat().st_size, left_out=tuple(left)
    )


def digests(archive: BinaryIO) -> dict[str, str]:
    """Name -> SHA-256 of each file of an archive; of a link, what it points to."""
    with tarfile.open(fileobj=archive, mode="r|gz") as tar:
        return {
            member.name: f"-> {member.linkname}" if member.issym() else hashlib.sha256(_read(tar, member)).hexdigest()
            for member in tar
        }


def texts(archive: BinaryIO, names: Iterable[str]) -> dict[str, str | None]:
    """The named files of an archive as text; None for what is no text."""
    wanted = set(names)
    found: dict[str, str | None] = {}
    with tarfile.open(fileobj=archive, mode="r|gz") as tar:
        for member in tar:
            if member.name in wanted:
                try:
                    found[member.name] = f"-> {member.linkname}\n" if member.issym() else _read(tar, member).decode()
                except UnicodeDecodeError:
                    found[member.name] = None
    return found


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    reader = tar.extractfile(member)
    return b"" if reader is None else reader.read()


def _rank(candidate: Candidate) -> tuple[bool, bool, str]:
    return not candidate.is_tracked, Path(candidate.name).suffix.lower() not in CODE, candidate.name


def _objection(candidate: Candidate, limits: Limits) -> Reason | None:
    """Why the file is not archived, as far as its name, kind and size tell."""
    if is_secret_file(candidate.name):
        return Reason.secret
    if candidate.link:
        return None if _stays_inside(candidate) else Reason.link
    if not stat.S_ISREG(candidate.mode):
        return Reason.special
    if not candidate.is_tracked and Path(candidate.name).suffix.lower() in DATA:
        return Reason.data
    return Reason.too_big if candidate.size_bytes > limits.max_file_bytes else None


def _stays_inside(candidate: Candidate) -> bool:
    """Relative, and inside the tree by name and in truth."""
    target = Path(os.path.normpath(candidate.file.parent / candidate.link))
    inside = target.is_relative_to(candidate.root) and Path(os.path.realpath(target)).is_relative_to(candidate.root)
    return inside and not os.path.isabs(candidate.link)


def _content(candidate: Candidate, limits: Limits, needles: Sequence[bytes]) -> tuple[Reason | None, bytes]:
    if candidate.link:
        return None, b""
    try:
        # What was a plain file a moment ago may be a link or a pipe now.
        descriptor = os.open(candidate.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as source:
            data = source.read(limits.max_file_bytes + 1)
    except OSError:
        return Reason.unreadable, b""
    if len(data) > limits.max_file_bytes:
        return Reason.too_big, b""
    if _PRIVATE_KEY.search(data) or any(needle in data for needle in needles):
        return Reason.holds_secret, b""
    return None, data


def _add(tar: tarfile.TarFile, candidate: Candidate, data: bytes) -> None:
    info = tarfile.TarInfo(candidate.name)
    if candidate.link:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, candidate.link, 0o777
    else:
        info.size, info.mode = len(data), 0o755 if candidate.mode & stat.S_IXUSR else 0o644
    tar.addfile(info, io.BytesIO(data))


def _left(candidate: Candidate, reason: Reason) -> LeftOut:
    size = 0 if candidate.link else candidate.size_bytes
    return LeftOut(path=candidate.name, size_bytes=size, reason=reason, is_tracked=candidate.is_tracked)


class _Hashing:
    """Passes bytes on, and hashes them."""

    def __init__(self, target: gzip.GzipFile) -> None:
        self._target = target
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._target.write(data)
