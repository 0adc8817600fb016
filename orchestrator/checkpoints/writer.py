"""Writes one rank's part of a checkpoint: its files, then its receipt. Nothing of it can be loaded before the commit.

Where the bytes come from is the caller's: a slot of shared memory, or living tensors. Nothing here imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import xxhash

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.commit import Receipt, write_receipt
from orchestrator.checkpoints.image import Image, file_entry
from orchestrator.checkpoints.job import Layout, SaveJob
from orchestrator.checkpoints.manifest import FileEntry


class ImageBytes(Protocol):
    """The bytes of one file, where they are."""

    def chunks(self) -> Iterator[memoryview]:
        """The head, then the tensors in the order of the image, in pieces of any size. Each is valid until the next
        is asked for."""
        ...


def write_job(job: SaveJob, layout: Layout, images: Sequence[ImageBytes], storage: Storage) -> Receipt:
    """Everything that one rank has to write, its receipt last; hashes are made while the bytes pass.

    `storage` is the root of the checkpoints. May be done again after a crash: the same names, the same bytes. Raises
    OSError; ValueError if an image is not as long as the layout says.
    """
    started = time.monotonic()
    inside = storage.join(job.name)
    files = [_write_image(inside, image, source) for image, source in zip(layout.images, images, strict=True)]
    files += [_write_text(inside, path, text.encode()) for path, text in sorted(job.texts.items())]
    receipt = Receipt(
        save=job.save, rank=job.rank, world_size=job.world_size, files=tuple(files), content=job.content,
        seconds={"copy": job.copy_seconds, "write": time.monotonic() - started}, sealed_at=job.sealed_at,
        draft=job.draft,
    )  # fmt: skip
    write_receipt(inside, receipt)
    return receipt


def _write_image(inside: Storage, image: Image, source: ImageBytes) -> FileEntry:
    hashes = _Hashes([image.head_bytes, *(piece.size_bytes for piece in image.pieces)])
    with inside.open_image(image.path, image.size_bytes) as output:
        for chunk in source.chunks():
            hashes.update(chunk)
            output.write(chunk)
        head, *pieces = hashes.end(image.path)
    return file_entry(image, head, pieces)


def _write_text(inside: Storage, path: str, data: bytes) -> FileEntry:
    inside.write_bytes(path, data)
    return FileEntry(path=path, size_bytes=len(data), head_bytes=len(data), head_xxh3=xxhash.xxh3_128_hexdigest(data))


class _Hashes:
    """Hashes of parts of known sizes that follow each other in a stream whose chunks know nothing of them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = iter(sizes)
        self._done: list[str] = []
        self._begin()

    def _begin(self) -> None:
        """The next part; empty ones are over at once."""
        self._digest = xxhash.xxh3_128()
        self._left = next(self._sizes, None)
        while self._left == 0:
            self._done.append(self._digest.hexdigest())
            self._left = next(self._sizes, None)

    def update(self, chunk: memoryview) -> None:
        while chunk:
            if self._left is None:
                raise ValueError("an image is longer than its layout says")
            part = chunk[: self._left]
            self._digest.update(part)
            self._left -= len(part)
            chunk = chunk[len(part) :]
            if not self._left:
                self._done.append(self._digest.hexdigest())
                self._begin()

    def end(self, path: str) -> list[str]:
        if self._left is not None:
            raise ValueError(f"{path} is {self._left} bytes or more shorter than its layout says")
        return self._done
