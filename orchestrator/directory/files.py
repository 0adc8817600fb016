"""Writes the files of a run's directory that are copies of the database; each appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.backends.storage import Storage
from orchestrator.directory import layout, metrics_file, record
from orchestrator.store.views import ChunkRow


def write_record(directory: Storage, found: record.Record) -> None:
    if not directory.exists(layout.README):
        directory.write_bytes(layout.README, layout.README_TEXT.encode())
    directory.write_bytes(layout.RECORD, record.encode(record.movable(found)))


def write_metrics(directory: Storage, blocks: Iterable[ChunkRow]) -> None:
    with directory.open_output(layout.METRICS) as output:
        for piece in metrics_file.lines(blocks):
            output.write(piece)
