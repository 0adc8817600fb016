"""Writes whole checkpoints as N ranks would, in one process: the real plan, images, receipts and commit, no trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
import xxhash

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import commit
from orchestrator.checkpoints.commit import Receipt
from orchestrator.checkpoints.image import Image, TensorSpec, file_entry, image
from orchestrator.checkpoints.manifest import STATE, FileEntry, Manifest, directory_name
from orchestrator.checkpoints.plan import layout, owners, tensor_file
from orchestrator.checkpoints.state import TrainState
from orchestrator.checkpoints.tensorfile import NAMES
from orchestrator.checkpoints.tree import dense, inline, pack

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""Group -> name -> tensor."""


def write_state(root: Storage, state: TrainState, **arguments: Any) -> Manifest:
    """A checkpoint of a state; `arguments` as for `write`."""
    snapshot = state.capture()
    return write(root, snapshot.tensors, tree=snapshot.tree, files=snapshot.files, shared=snapshot.shared, **arguments)


def write(
    root: Storage,
    tensors: Tensors,
    *,
    world_size: int = 1,
    step: int = 1,
    attempt: int = 1,
    tree: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    shared: Collection[str] | None = None,
    split: Collection[str] = (),
    own: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    is_committed: bool = True,
    **fields: Any,
) -> Manifest:
    """Writes `step_…-a…` under `root`, which holds a run's checkpoints.

    `shared`: group/name of what is divided over the ranks, by default everything; `split`: of what each rank holds some
    rows of; `own`: rank -> buffers that differ there. The rank's own values are {"rank": its number}. Further `fields`
    are the manifest's.
    """
    name = directory_name(step, attempt)
    inside = root.join(name)
    save = hashlib.sha256(f"{root.uri()}/{name}".encode()).hexdigest()[:32]
    draft = _draft(save=save, name=name, step=step, attempt=attempt, world_size=world_size, **fields)
    groups = {
        group: [
            _spec(f"{group}/{key}", key, tensor, shared)
            for key, tensor in named.items()
            if f"{group}/{key}" not in split
        ]
        for group, named in tensors.items()
    }
    plan = owners(groups, world_size)
    for rank in range(world_size):
        entries = []
        if split:
            entries += _write_with_rows(inside, tensors, groups, plan, split, rank, world_size)
        else:
            made, heads = layout(
                groups, plan, rank, world_size, files={key: len(data) for key, data in (files or {}).items()}
            )
            for each, head in zip(made.images, heads, strict=True):
                data = _pieces(each, tensors, files or {})
                entries.append(_write_image(inside, each, head, data))
        if own and rank in own:
            specs = [_spec("", key, tensor, None) for key, tensor in own[rank].items()]
            each, head = image(tensor_file("rank", rank, world_size), specs)
            entries.append(_write_image(inside, each, head, [_bytes(own[rank][piece.name]) for piece in each.pieces]))
        if rank == 0:
            text = json.dumps({"tree": dict(tree or {"extra": {}}), "progress": dict(progress or {})}).encode()
            inside.write_bytes(STATE, text)
            entries.append(_text(STATE, text))
        receipt = Receipt(
            save=save, rank=rank, world_size=world_size, files=tuple(entries), content=pack({"rank": rank}, inline),
            sealed_at=1.0, seconds={"copy": 0.1, "write": 0.2}, draft=draft if rank == 0 else None,
        )  # fmt: skip
        commit.write_receipt(inside, receipt)
    if not is_committed:
        return Manifest.from_fields({**draft, "files": (), "duration": 0.0, "reasons": ()})
    manifest = commit.finish(inside)
    assert manifest is not None
    return manifest


def random_tensors(*, rows: int = 6, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """A model and an optimizer with a tensor of every kind that is awkward to store."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model": {
            "fc.weight": some(rows, 40),
            "fc.bias": some(rows),
            "norm.count": torch.tensor(7),
            "half": some(33).to(torch.bfloat16),
            "eighth": some(5).to(torch.float8_e4m3fn),
            "flags": some(3) > 0,
            "empty": some(0, 4),
        },
        "optim": {"optimizer.state.0.exp_avg": some(rows, 40), "optimizer.state.0.step": torch.tensor(3.0)},
    }


def _write_with_rows(
    inside: Storage,
    tensors: Tensors,
    groups: Mapping[str, list[TensorSpec]],
    plan: Mapping[str, int],
    split: Collection[str],
    rank: int,
    world_size: int,
) -> list[FileEntry]:
    """As FSDP2 would have it: of some tensors every rank writes its own rows."""
    entries = []
    for group, named in tensors.items():
        specs = [spec for spec in groups[group] if plan[f"{group}/{spec.name}"] == rank]
        data = {spec.name: named[spec.name] for spec in specs}
        for key in (key for key in named if f"{group}/{key}" in split):
            whole = named[key]
            begin = sum(len(part) for part in whole.tensor_split(world_size)[:rank])
            rows = whole.tensor_split(world_size)[rank]
            if not rows.numel():
                continue
            data[key] = rows
            offsets = (begin, *[0] * (whole.dim() - 1))
            specs.append(
                TensorSpec(key, NAMES[rows.dtype], tuple(rows.shape), rows.nbytes, False, offsets, tuple(whole.shape))
            )
        if specs:
            each, head = image(tensor_file(group, rank, world_size), specs)
            entries.append(_write_image(inside, each, head, [_bytes(data[piece.name]) for piece in each.pieces]))
    return entries


def _write_image(inside: Storage, each: Image, head: bytes, pieces: list[bytes]) -> FileEntry:
    with inside.open_output(each.path) as output:
        for data in (head, *pieces):
            output.write(data)
    return file_entry(each, xxhash.xxh3_128_hexdigest(head), [xxhash.xxh3_128_hexdigest(data) for data in pieces])


def _pieces(each: Image, tensors: Tensors, files: Mapping[str, bytes]) -> list[bytes]:
    group, _, rest = each.path.partition("/")
    return [files[rest] if group == "side" else _bytes(tensors[group][piece.name]) for piece in each.pieces]


def _spec(path: str, name: str, tensor: torch.Tensor, shared: Collection[str] | None) -> TensorSpec:
    is_shared = shared is None or path in shared
    return TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, is_shared)


def _bytes(tensor: torch.Tensor) -> bytes:
    return dense(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


def _text(path: str, data: bytes) -> FileEntry:
    return FileEntry(path=path, size_bytes=len(data), head_bytes=len(data), head_xxh3=xxhash.xxh3_128_hexdigest(data))


def _draft(**fields: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "run": "r1", "epoch": 0, "epoch_complete": True, "seed": 0, "config_hash": "", "created": 0.0, "duration": 0.0,
        "files": (),
    }  # fmt: skip
    return commit.draft_of(Manifest(**{**plain, **fields}))
