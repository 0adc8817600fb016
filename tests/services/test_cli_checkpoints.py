"""`orc checkpoint …` on real checkpoints and a real database."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
import torch
from safetensors.torch import load_file

from orchestrator.backends import postgres as server_of
from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, reader
from orchestrator.checkpoints.catalog import Hold
from orchestrator.checkpoints.manifest import MANIFEST, CheckpointInfo, Manifest
from orchestrator.cli import main, patience
from orchestrator.cli.output import Output
from orchestrator.cli.patience import Patience
from orchestrator.records import FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.store.store import Store
from tests.plugins.api_server import serving
from tests.plugins.checkpoint_files import random_tensors, write
from tests.plugins.producers import Producer, fact

NOW = time.time()
NAMES = [f"step_{step:08d}-a1" for step in (10, 20, 30, 40)]
RULES = {"keep_last": 2, "keep_best": 1, "best_metric": "val/loss", "best_direction": "min"}


class Orc(Protocol):
    def __call__(self, *words: str, code: int = 0) -> Any:
        """`orc checkpoint …`: the document of --json, or else what was printed; stderr where it did not end with 0."""
        ...


@dataclass(frozen=True)
class Stacked:
    """A data directory with a run that has four checkpoints, the second of them the best."""

    home: Path
    store: Store
    ticket: RunTicket

    @property
    def root(self) -> Storage:
        return Storage(self.ticket.directory).join("checkpoints")

    def names(self) -> list[str]:
        return sorted(manifest.name for manifest in catalog.scan(self.root).committed)

    def states(self) -> dict[str, str]:
        return {row.id.rpartition("/")[2]: row.state for row in self.store.checkpoints(self.ticket.run)}

    def run(self, name: str, steps: tuple[int, ...], config: dict[str, Any] | None = None) -> RunTicket:
        return recorded(self.store, self.home, name, steps, config)


@pytest.fixture
def stacked(schema_url: str, tmp_path: Path) -> Iterator[Stacked]:
    """Alone in its database: some verbs look at all runs."""
    home = tmp_path / "home"
    home.mkdir()
    Stack(home=str(home), database_url=schema_url, storage_url=str(home / "runs")).save()
    store = Store(schema_url, pool_size=2)
    yield Stacked(home, store, recorded(store, home, "brave-otter", (10, 20, 30, 40), {"checkpoints": RULES}))
    store.close()
    with psycopg.connect(server_of.conninfo(schema_url), autocommit=True) as sql:
        for table in ("model_versions", "models", "runs"):
            sql.execute(f"DELETE FROM {table}")


def recorded(store: Store, home: Path, name: str, steps: tuple[int, ...], config: dict[str, Any] | None) -> RunTicket:
    spec = RunSpec(experiment="digits", name=name, storage_url=str(home / "runs"), config=config or {})
    ticket = store.open_attempt(spec, now=NOW, lease_seconds=1e6)
    root = Storage(ticket.directory).join("checkpoints")
    for step in steps:
        manifest = written(root, ticket, step)
        said = CheckpointInfo.of(manifest, root.uri(manifest.name)).to_json()
        store.commit([Producer(ticket).facts(fact(FactKind.checkpoint, at=NOW - 100 + step, **said))])
    return ticket


def written(root: Storage, ticket: RunTicket, step: int, **fields: Any) -> Manifest:
    metrics = {"val/loss": abs(step - 20) / 10}
    return write(
        root, random_tensors(), step=step, world_size=2, run=ticket.run, created=NOW - 100 + step, metrics=metrics,
        is_best=step == 20, reasons=("every_steps",), label=f"v0.{step}", **fields,
    )  # fmt: skip


@pytest.fixture
def orc(stacked: Stacked, capsys: pytest.CaptureFixture[str]) -> Orc:
    def call(*words: str, code: int = 0) -> Any:
        assert main.main(["--home", str(stacked.home), "checkpoint", *words]) == code, capsys.readouterr()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        if "--json" in words:
            return json.loads(shown.out)
        return shown.err if code == 2 else shown.out

    return call


def ended(stacked: Stacked, ticket: RunTicket | None = None) -> None:
    stacked.store.transition((ticket or stacked.ticket).run, 1, RunStatus.finished, now=NOW)


# -- looking -----------------------------------------------------------------------------------------------------------


def test_ls_lists_the_newest_first_and_says_why_each_is_kept(orc: Orc, stacked: Stacked) -> None:
    rows = orc("ls", "--json")
    assert [row["name"] for row in rows] == NAMES[::-1]
    assert [row["kept_because"] for row in rows] == [["last"], ["last"], ["best val/loss"], []]
    assert (rows[0]["reasons"], rows[0]["world_size"], rows[0]["resumable"]) == (["every_steps"], 2, True)
    shown = orc("ls", "brave-otter")
    assert shown.splitlines()[0].split()[:3] == ["name", "step", "epoch"]
    assert "best val/loss" in shown


def test_ls_asks_an_api_server_and_says_the_same(
    orc: Orc, stacked: Stacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orc("pin", "last@10")
    here = orc("ls", "--all", "--json")
    with serving(Stack.load(stacked.home)) as served:
        monkeypatch.setenv("ORC_API_TOKEN", Path(served.api_token_path).read_text())
        words = ["--home", str(tmp_path / "none"), "checkpoint", "ls", "last", "--all", "--json", "--api"]
        assert main.main([*words, served.api_url]) == 0
    assert json.loads(capsys.readouterr().out) == here
    assert here[-1]["kept_because"] == ["pinned"]


def test_ls_shows_what_was_deleted_only_when_asked(orc: Orc, stacked: Stacked) -> None:
    orc("rm", f"brave-otter@{NAMES[0]}", "--yes")
    assert [row["name"] for row in orc("ls", "--json")] == NAMES[:0:-1]
    assert [(row["name"], row["state"]) for row in orc("ls", "--all", "--json")][-1] == (NAMES[0], "deleted")


def test_a_directory_is_read_without_a_database(
    stacked: Stacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(stacked.ticket.directory) / "checkpoints" / NAMES[0] / MANIFEST).write_text("{")
    for place in (stacked.ticket.directory, stacked.root.uri()):
        assert main.main(["--home", str(tmp_path / "none"), "checkpoint", "ls", place, "--all", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["name"], row["state"]) for row in rows] == [
            *((name, "committed") for name in NAMES[:0:-1]), (NAMES[0], "damaged"),
        ]  # fmt: skip
    for place in (stacked.root.uri(NAMES[1]), f"{stacked.ticket.directory}@{NAMES[1]}"):
        assert main.main(["--home", str(tmp_path / "none"), "checkpoint", "show", place, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == 20


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("last", NAMES[3]),
        ("brave-otter@latest", NAMES[3]),
        ("brave-otter@best", NAMES[1]),
        ("brave-otter@v0.10", NAMES[0]),
        ("brave-otter@30", NAMES[2]),
        (f"brave-otter@{NAMES[2]}", NAMES[2]),
    ],
)
def test_a_checkpoint_is_found_by_name_label_step_latest_and_best(orc: Orc, reference: str, name: str) -> None:
    assert orc("show", reference, "--json")["name"] == name


def test_show_tells_all_of_a_checkpoint(orc: Orc, stacked: Stacked) -> None:
    catalog.hold(stacked.root, NAMES[1], Hold.pinned)
    document = orc("show", "last@best", "--json")
    assert (document["holds"], document["kind"], document["resumable"]) == (["pinned"], "sharded", True)
    assert document["uri"] == stacked.root.uri(NAMES[1])
    assert "rank-0001.json" in [file["path"] for file in document["files"]]
    shown = orc("show", "last@best")
    for part in ("every_steps", "pinned", "val/loss=0", "model-00001-of-00002.safetensors", "orc checkpoint verify"):
        assert part in shown


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("brave-otter@step_00000011-a1", "Did you mean"),
        (f"brave-otter@{NAMES[0]}", "was damaged and set aside"),
        ("brave-otter@step_00000099-a1", "being written, or was left unfinished"),
        ("nobody@best", "There is no run 'nobody'"),
        ("empty-owl", "None is in"),
        ("/nowhere/at/all", "There is no such directory."),
    ],
)
def test_what_is_not_there_is_explained(orc: Orc, stacked: Stacked, reference: str, why: str) -> None:
    catalog.quarantine(stacked.root, NAMES[0], "a bit flipped", now=NOW)
    written(stacked.root, stacked.ticket, 99, is_committed=False)
    stacked.run("empty-owl", ())
    assert why in orc("show", reference, code=2)


# -- verify and export -------------------------------------------------------------------------------------------------


def test_verify_reads_every_byte_and_changes_nothing(orc: Orc, stacked: Stacked) -> None:
    assert orc("verify", "--all", "--json")["is_sound"] is True
    file = Path(stacked.root.uri(NAMES[2])) / "model" / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "every byte is as it was written" in orc("verify", f"last@{NAMES[3]}")
    document = orc("verify", "--all", "--json", code=1)
    assert {each["name"]: bool(each["damages"]) for each in document["checkpoints"]} == {
        name: name == NAMES[2] for name in NAMES
    }
    (damage,) = (damage for each in document["checkpoints"] for damage in each["damages"])
    assert damage["file"] == "model/model-00001-of-00002.safetensors"
    assert damage["tensor"]
    assert "damaged" in orc("verify", f"last@{NAMES[2]}", code=1)
    assert stacked.names() == NAMES, "nothing was set aside"


def test_what_is_verified_or_exported_is_held_and_what_just_went_is_said_to_be_gone(
    orc: Orc, stacked: Stacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = reader.verify

    def looking(*given: Any, **more: Any) -> Any:
        seen.append(catalog.holds(stacked.root, NAMES[3], now=time.time()))
        catalog.remove(stacked.root, NAMES[1])
        return real(*given, **more)

    monkeypatch.setattr(reader, "verify", looking)
    checked = orc("verify", "--all", "--json")["checkpoints"]
    assert [each["name"] for each in checked] == [NAMES[3], NAMES[2], NAMES[0]]
    assert seen[0] == {Hold.in_use}
    assert catalog.holds(stacked.root, NAMES[3], now=time.time()) == frozenset()

    def going(storage: Storage, name: str, **more: Any) -> Any:
        raise FileNotFoundError(storage.uri(name))

    monkeypatch.setattr(catalog, "in_use", going)
    assert "It was deleted just now" in orc("export", "last", "-o", str(tmp_path / "x.pt"), code=2)
    assert "It was deleted just now" in orc("verify", "last", code=2)


def test_verify_finds_a_damaged_manifest(orc: Orc, stacked: Stacked) -> None:
    (Path(stacked.root.uri(NAMES[0])) / MANIFEST).write_text("{}")
    assert "JSON with a digest" in orc("verify", "--all", code=1)
    assert orc("verify", f"last@{NAMES[0]}", "--json", code=1)["checkpoints"][0]["name"] == NAMES[0]


def test_export_writes_what_torch_loads(
    orc: Orc, stacked: Stacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = orc("export", "last@best", "--format", "safetensors", "--json")
    assert document["path"] == f"brave-otter-{NAMES[1]}.safetensors"
    assert (document["step"], document["size_bytes"]) == (20, (tmp_path / document["path"]).stat().st_size)
    loaded = load_file(tmp_path / document["path"])
    assert torch.equal(loaded["fc.weight"], random_tensors()["model"]["fc.weight"])
    again = orc("export", "last@best", "--format", "safetensors", code=2)
    assert "exists already" in again
    assert "is no directory" in orc("export", "last", "--output", "nowhere/x.pt", code=2)
    orc("export", "last", "--output", "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["step"] == 40
    orc("export", "last", "--format", "dcp", "--output", "dcp")
    assert (tmp_path / "dcp" / ".metadata").exists()


def test_a_damaged_checkpoint_is_not_exported(orc: Orc, stacked: Stacked, tmp_path: Path) -> None:
    (Path(stacked.root.uri(NAMES[3])) / "model" / "model-00001-of-00002.safetensors").unlink()
    said = orc("export", "last", "--output", str(tmp_path / "x.pt"), code=2)
    assert "is damaged: no file" in said
    assert not (tmp_path / "x.pt").exists()


# -- pin, rm -----------------------------------------------------------------------------------------------------------


def test_a_pin_lasts_until_it_is_taken_back(orc: Orc, stacked: Stacked) -> None:
    assert orc("pin", "last@10", "--json")["is_pinned"] is True
    assert catalog.holds(stacked.root, NAMES[0]) == {Hold.pinned}
    assert [row["is_pinned"] for row in orc("ls", "--json")] == [False, False, False, True]
    assert "is pinned. `orc checkpoint unpin" in orc("rm", "last@10", "--yes", code=2)
    orc("unpin", "last@10")
    assert catalog.holds(stacked.root, NAMES[0]) == frozenset()
    orc("rm", "last@10", "--yes")
    assert "say which: RUN@NAME" in orc("pin", "last", code=2)


def test_rm_removes_files_and_then_says_so(orc: Orc, stacked: Stacked) -> None:
    assert [each["name"] for each in orc("rm", "last@10", "last@best", "--dry-run", "--json")["checkpoints"]] == [
        NAMES[0], NAMES[1],
    ]  # fmt: skip
    assert "there is no terminal to ask on" in orc("rm", "last@10", code=2)
    assert "has no checkpoint" in orc("rm", "last@10", "last@nothing", "--yes", code=2)
    assert stacked.names() == NAMES, "all or nothing"
    assert "removed: run brave-otter" in orc("rm", "last@10", "last@v0.10", "--yes")
    assert stacked.names() == NAMES[1:]
    assert not Path(stacked.root.uri(NAMES[0])).exists()
    assert stacked.states()[NAMES[0]] == "deleted"
    orc("rm", "last@best", "--yes")
    assert json.loads((Path(stacked.root.uri()) / "best.json").read_text())["name"] == NAMES[2], "the next best one"


def test_a_person_is_asked(orc: Orc, stacked: Stacked, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = Terminal()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert orc("rm", "last@10", code=1) == ""
    assert "Remove this checkpoint for good?" in said.getvalue()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    orc("rm", "last@10")
    assert stacked.names() == NAMES[1:]


def test_ls_says_what_holds_a_checkpoint_even_where_no_rule_is_known(orc: Orc, stacked: Stacked) -> None:
    script = stacked.run("own-rules", (10, 20), config={"lr": 0.1})
    for ticket in (stacked.ticket, script):
        catalog.hold(Storage(ticket.directory).join("checkpoints"), NAMES[0], Hold.in_use, until=1e12, token="reader")
        with psycopg.connect(server_of.conninfo(Stack.load(stacked.home).database_url), autocommit=True) as sql:
            sql.execute("INSERT INTO models (project, name) VALUES ('p', %s)", (ticket.run,))
            sql.execute(
                "INSERT INTO model_versions (model_id, version, run_id, checkpoint_id) SELECT id, 1, %s, %s FROM models"
                " WHERE name = %s", (ticket.run, f"{ticket.run}/{NAMES[0]}", ticket.run),
            )  # fmt: skip
    orc("pin", "brave-otter@10")
    assert orc("ls", "brave-otter", "--json")[-1]["kept_because"] == ["in use", "pinned", "registered"]
    assert orc("ls", "own-rules", "--json")[-1]["kept_because"] == ["in use", "registered"]
    assert "in use, pinned, registered" in orc("ls", "brave-otter")
    assert orc("ls", stacked.root.uri(), "--json")[-1]["kept_because"] == ["in use", "pinned"], "what storage says"


def test_the_newest_of_a_running_run_and_what_is_read_stays(orc: Orc, stacked: Stacked) -> None:
    assert "is the newest of run brave-otter, which is RUNNING" in orc("rm", "last@latest", "--yes", code=2)
    weights = written(stacked.root, stacked.ticket, 50, kind="weights", resumable=False)
    for name in (weights.name, NAMES[3]):
        assert "would restart from it" in orc("rm", f"last@{name}", "--yes", code=2)
    catalog.remove(stacked.root, weights.name)
    catalog.hold(stacked.root, NAMES[0], Hold.in_use, until=time.time() + 60, token="reader")
    assert "somebody is reading it" in orc("rm", "last@10", "--yes", code=2)
    orc("rm", "last@10", "last@latest", "--yes", "--force")
    assert stacked.names() == NAMES[1:3]


def test_what_a_model_was_made_from_is_never_removed(orc: Orc, stacked: Stacked) -> None:
    run = stacked.ticket.run
    with psycopg.connect(server_of.conninfo(Stack.load(stacked.home).database_url), autocommit=True) as sql:
        sql.execute("INSERT INTO models (project, name) VALUES ('p', 'digits')")
        sql.execute(
            "INSERT INTO model_versions (model_id, version, run_id, checkpoint_id) SELECT id, 3, %s, %s FROM models",
            (run, f"{run}/{NAMES[0]}"),
        )
    assert "model digits version 3 was made from it" in orc("rm", "last@10", "--yes", "--force", code=2)
    ended(stacked)
    orc("gc", "--keep-last", "1", "--keep-best", "0", "--yes")
    assert stacked.names() == [NAMES[0], NAMES[3]]


# -- gc, rebuild -------------------------------------------------------------------------------------------------------


def test_gc_does_what_the_runs_config_says_and_only_with_yes(orc: Orc, stacked: Stacked) -> None:
    ended(stacked)
    document = orc("gc", "--json")
    assert document["dry_run"] is True
    assert [each["name"] for each in document["runs"][0]["delete"]] == [NAMES[0]]
    assert document["size_bytes"] == document["runs"][0]["delete"][0]["size_bytes"] > 0
    assert orc("gc", "last", "--dry-run", "--yes", "--json")["dry_run"] is True
    assert "--yes does it" in orc("gc")
    assert stacked.names() == NAMES
    assert "no rule keeps it" in orc("gc", "last", "--yes")
    assert stacked.names() == NAMES[1:]
    assert stacked.states()[NAMES[0]] == "deleted"
    orc("gc", "--experiment", "digits", "--keep-last", "1", "--yes")
    assert stacked.names() == [NAMES[1], NAMES[3]], "the best stays"
    assert json.loads((Path(stacked.root.uri()) / "best.json").read_text())["name"] == NAMES[1]


def test_gc_leaves_a_running_run_and_unknown_rules_alone(orc: Orc, stacked: Stacked) -> None:
    script = stacked.run("own-rules", (10, 20), config={"lr": 0.1})
    ended(stacked, script)
    left = {each["name"]: each["left"] for each in orc("gc", "--yes", "--json")["runs"]}
    assert "is RUNNING" in left["brave-otter"]
    assert "give --keep-last" in left["own-rules"]
    assert stacked.names() == NAMES
    orc("gc", "own-rules", "--keep-last", "1", "--yes")
    assert [m.step for m in catalog.scan(Storage(script.directory).join("checkpoints")).committed] == [20]


def test_gc_marks_what_others_deleted_and_takes_what_the_killed_left(orc: Orc, stacked: Stacked) -> None:
    catalog.remove(stacked.root, NAMES[0])
    (told,) = orc("gc", "--json")["runs"]
    assert told["gone"] == [f"{stacked.ticket.run}/{NAMES[0]}"]
    assert stacked.states()[NAMES[0]] == "committed"
    assert "would be marked as deleted" in orc("gc")
    orc("gc", "--yes")
    assert stacked.states() == {NAMES[0]: "deleted"} | dict.fromkeys(NAMES[1:], "committed")
    assert orc("gc", "--json")["runs"][0]["gone"] == []
    ended(stacked)
    left = Path(stacked.root.uri()) / NAMES[3] / "model" / f"x.{2**22 + 1}-0123abcd.partial"
    left.write_bytes(b"half")
    os.utime(left, (1000, 1000))
    orc("gc", "--yes")
    assert not left.exists()
    assert "Did you mean digits" in orc("gc", "--experiment", "digitz", code=2)


def test_a_quota_is_shared_and_each_run_keeps_its_newest(orc: Orc, stacked: Stacked) -> None:
    ended(stacked)
    other = stacked.run("calm-finch", (10, 30), {"checkpoints": {**RULES, "keep_last": 0}})
    ended(stacked, other)
    catalog.hold(stacked.root, NAMES[1], Hold.pinned)
    orc("gc", "--experiment", "digits", "--quota-gb", "0.000000001", "--yes")
    assert stacked.names() == [NAMES[1], NAMES[3]]
    assert [m.step for m in catalog.scan(Storage(other.directory).join("checkpoints")).committed] == [30]


def test_gc_finishes_what_is_whole_and_sweeps_what_is_not(
    orc: Orc, stacked: Stacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(stacked)
    whole = written(stacked.root, stacked.ticket, 50, is_committed=False)
    half = written(stacked.root, stacked.ticket, 60, is_committed=False)
    (Path(stacked.root.uri(half.name)) / "rank-0001.json").unlink()
    assert orc("gc", "--yes", "--json")["runs"][0]["sweep"] == [], "somebody may be at it"
    later = time.time() + 7200
    monkeypatch.setattr(time, "time", lambda: later)
    (told,) = orc("gc", "--json")["runs"]
    assert (told["finish"], told["sweep"]) == ([whole.name], [half.name])
    (told,) = orc("gc", "--yes", "--json")["runs"]
    assert (told["finish"], told["sweep"]) == ([whole.name], [half.name])
    assert whole.name in stacked.names()
    assert stacked.states()[whole.name] == "committed"
    assert not Path(stacked.root.uri(half.name)).exists()


def test_rebuild_puts_the_list_right(orc: Orc, stacked: Stacked) -> None:
    written(stacked.root, stacked.ticket, 50)
    catalog.remove(stacked.root, NAMES[0])
    document = orc("rebuild", "--json")
    assert (document["runs"], document["checkpoints"], document["gone"]) == (
        1, 4, [f"{stacked.ticket.run}/{NAMES[0]}"],
    )  # fmt: skip
    assert stacked.states() == {NAMES[0]: "deleted"} | dict.fromkeys([*NAMES[1:], "step_00000050-a1"], "committed")
    assert "0 rows were put right" in orc("rebuild", "brave-otter")
    (Path(stacked.root.uri(NAMES[1])) / MANIFEST).write_text("{}")
    assert NAMES[1] in orc("rebuild", code=1)


def test_what_takes_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    monkeypatch.setattr(patience, "IN_FILE", 0.001)

    class Stream(io.StringIO):
        def write(self, line: str) -> int:
            written = super().write(line)
            if "1.0 KiB of 4.0 KiB" in line:
                is_told.set()
            return written

    is_told = threading.Event()
    stream = Stream()
    with Patience(Output(stderr=stream), "looking") as waiting:
        waiting.bytes("step_1", 1024, 4096)
        assert is_told.wait(10)
    said = stream.getvalue()
    assert "1.0 KiB of 4.0 KiB step_1" in said
    assert "\033" not in said
