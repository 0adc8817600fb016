"""A directory of one machine is no storage for several. Real directories stand for the disks of two machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.execution.shared_storage import Ask, check_shared, local_path, read_marker


def nodes_with(disks: Mapping[str, Path], storage: Path) -> Ask:
    """Each node looks for the path on a disk of its own."""

    def ask(path: str, token: str) -> dict[str, str]:
        name = Path(path).relative_to(storage)
        return {node: read_marker(str(disk / name), token, patience=0) for node, disk in disks.items()}

    return ask


def test_storage_that_every_node_sees_is_taken_and_left_clean(tmp_path: Path) -> None:
    storage = tmp_path / "shared" / "runs"
    check_shared(str(storage), "head", nodes_with({"b": storage, "c": storage}, storage))
    assert list(storage.iterdir()) == []


def test_a_path_that_is_another_disk_elsewhere_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    storage, elsewhere = tmp_path / "head", tmp_path / "node"
    elsewhere.mkdir()
    ask = nodes_with({"gpu-1 at 10.0.0.1": storage, "gpu-2 at 10.0.0.2": elsewhere}, storage)
    with pytest.raises(ConfigError) as refused:
        check_shared(f"file://{storage}", "head at 10.0.0.9", ask)
    said = str(refused.value)
    for word in ("storage.url", str(storage), "gpu-2", "head at 10.0.0.9", "no such file", "s3://", "strict_pack"):
        assert word in said, word
    assert "gpu-1" not in said
    assert list(storage.iterdir()) == []


def test_another_file_of_the_same_name_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "marker").write_text("old")
    assert read_marker(str(tmp_path / "marker"), "new", patience=0) == "another file is there"


def test_a_path_that_cannot_be_written_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written on head"):
        check_shared(str(tmp_path / "file" / "runs"), "head", nodes_with({}, tmp_path))


@pytest.mark.parametrize(
    ("url", "path"), [("/data/runs", "/data/runs"), ("file:///data/my%20runs", "/data/my runs"), ("s3://b/runs", None)]
)
def test_only_plain_paths_are_asked_about(url: str, path: str | None) -> None:
    assert local_path(url) == (Path(path) if path else None)
