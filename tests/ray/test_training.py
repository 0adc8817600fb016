"""The main job and its ends, on a real cluster."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints.local import places
from orchestrator.checkpoints.local.requests import ask
from tests.plugins.runs import PROJECT, Going, Orc, wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits(orc: Orc) -> dict[str, Any]:
    """What `orc run` says of the main job."""
    return orc.json("run", "experiment=digits")


def test_the_digits_job_reaches_97_percent_and_everything_is_recorded(orc: Orc, digits: dict[str, Any]) -> None:
    outcome = digits
    assert outcome["status"] == "FINISHED"
    shown = orc.json("show", outcome["run"])
    assert shown["status"] == "FINISHED"
    store = orc.store()
    accuracy = store.points(outcome["run"], "val/accuracy", rank=0)
    assert accuracy.values[-1] >= 0.97
    assert {p.name for p in store.params(outcome["run"])} >= {"epochs", "optim.lr"}
    assert len(store.attempts(outcome["run"])) == 1
    assert store.checkpoints(outcome["run"])
    assert {s.rank for s in store.summaries(outcome["run"]) if s.key == "train/loss"} == {0, 1}
    directory = Path(outcome["directory"])
    for name in ("config.json", "config.yaml", "logs/attempt-1/rank-0.log", "logs/attempt-1/rank-1.log"):
        assert (directory / name).exists(), name
    assert list((directory / "checkpoints").glob("*/MANIFEST.json"))
    confusion = (directory / "artifacts" / "confusion.csv").read_text().splitlines()
    assert len(confusion) == 11
    assert sum(int(value) for row in confusion[1:] for value in row.split(",")[1:]) == 360


def test_the_digits_job_shows_up_in_mlflow(orc: Orc, digits: dict[str, Any]) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = orc.store()
    run = store.run(digits["run"])
    client = mlflow.MlflowClient(orc.stack.mlflow_uri)

    def mirrored() -> list:
        experiments = [e.experiment_id for e in client.search_experiments()]
        found = client.search_runs(experiments, filter_string=f"tags.`orc.run_id` = '{run.run}'")
        return [r for r in found if r.info.status == "FINISHED"]

    (found,) = wait_until(mirrored, 30, "the run in MLflow")
    ours = store.points(run.run, "train/loss", rank=0)
    theirs = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in theirs) == sorted(
        zip(ours.steps.tolist(), ours.values.tolist(), strict=True)
    )
    assert found.data.params["epochs"] == str(next(p.value for p in store.params(run.run) if p.name == "epochs"))


def test_every_rank_logs_every_kind_of_number_and_secrets_stay_secret(orc: Orc) -> None:
    canary = "canary-7f3a9c2e51"
    outcome = orc.json("run", "train=trains:odd_values", "secret=${oc.env:MY_PASSWORD}", MY_PASSWORD=canary)
    assert outcome["status"] == "FINISHED"
    store = orc.store()
    values = {
        key: store.points(outcome["run"], key, rank=1) for key in ("nan", "inf", "minus_inf", "bool", "big", "rank")
    }
    assert math.isnan(values["nan"].values[0])
    assert values["inf"].values[0] == math.inf
    assert values["minus_inf"].values[0] == -math.inf
    assert (values["bool"].values[0], values["big"].values[0]) == (1.0, 2.0**53)
    assert (values["rank"].steps.tolist(), values["rank"].values.tolist()) == ([-5, 2**40], [1.0, 11.0])
    params = {p.name: (p.type, p.value) for p in store.params(outcome["run"])}
    assert params["layers"] == ("int", 3)
    assert params["flag"] == ("bool", True)
    assert store.tags(outcome["run"])["team"] == "tests"
    assert [n.text for n in store.notes(outcome["run"])] == ["a note"]
    (artifact,) = store.artifacts(outcome["run"])
    assert (artifact.name, artifact.size_bytes) == ("greeting.txt", 5)
    _nowhere(orc, canary, Path(outcome["directory"]))


def _nowhere(orc: Orc, canary: str, directory: Path) -> None:
    """The canary is in no file of the home (logs, run directory, tracker's log, Ray's logs) and in no dump of a
    database.
    """
    dump = orc.home / "dump.bin"
    orc("db", "backup", str(dump))
    leaks = []
    needle = canary.encode()
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(orc.stack.mlflow_uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert runs, "the mirror has copied runs"
    assert canary not in repr([run.to_dictionary() for run in runs])
    token = Path(orc.stack.ray_token_path).read_text()
    jobs = urllib.request.Request(f"{orc.stack.ray_dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    assert needle not in urllib.request.urlopen(jobs, timeout=10).read()
    for folder, _, names in os.walk(orc.home):
        if "postgres" in Path(folder).relative_to(orc.home).parts[:1]:
            continue
        for name in names:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink() and needle in path.read_bytes():
                leaks.append(str(path))
    dump.unlink()
    assert leaks == []
    logged = (directory / "logs" / "attempt-1" / "rank-0.log").read_text()
    assert "connecting with" in logged


def test_the_first_failing_rank_is_named(orc: Orc) -> None:
    shown = orc("run", "train=trains:raises", code=1)
    assert "ValueError: the data of rank 1 is broken on rank 1" in shown
    run = orc.json("ls", "--limit", "1")[0]
    assert run["status"] == "FAILED"
    details = orc.store().run(run["run"])
    assert details.error is not None
    assert details.error["rank"] == 1
    assert "trains.py" in details.error["hint"]
    assert orc.store().points(run["run"], "before").ranks.tolist() == [0, 1]


def test_a_cancelled_run_ends_cancelled_and_keeps_what_it_logged(orc: Orc, going: Callable[..., Going]) -> None:
    run = going()
    orc("cancel", run.run)
    assert run.process.wait(timeout=40) == 1
    assert run.status() == "CANCELLED"
    assert run.stored(0) == list(range(run.counted(0)))


def test_ctrl_c_ends_a_run_gracefully(going: Callable[..., Going]) -> None:
    run = going()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(timeout=40)
    assert run.status() == "CANCELLED"
    assert run.stored(1) == list(range(run.counted(1)))


def _ray_job(orc: Orc, *words: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Plain Ray tooling: nothing of ours but the address and the token."""
    stack = orc.stack
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": stack.ray_token_path}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ORC_"))} | token
    command = [
        str(Path(sys.executable).with_name("ray")),
        "job",
        *words[:1],
        "--address",
        stack.ray_dashboard,
        *words[1:],
    ]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _committed_by_the_writer(orc: Orc) -> int:
    root = Path(orc.stack.slab_directory)
    return ask(places.request_socket(root), "health", {}, 5.0)["committed"]


def test_ray_job_submit_with_plain_tooling(orc: Orc) -> None:
    entry = ("python", "-m", "jobs.train", "experiment=digits", "epochs=3")
    committed = _committed_by_the_writer(orc)
    job = _ray_job(orc, "submit", "--submission-id", "digits-1", "--working-dir", ".", "--", *entry)
    out, _ = job.communicate(timeout=150)
    assert job.returncode == 0, out
    run = orc.json("ls", "--limit", "1")[0]
    assert (run["status"], run["job"]) == ("FINISHED", "digits-1")
    assert _committed_by_the_writer(orc) - committed == len(orc.store().checkpoints(run["run"])) > 0
    job = orc.dashboard("/api/jobs/digits-1")
    assert job["status"] == "SUCCEEDED"
    assert (job["metadata"]["orc.run"], job["metadata"]["orc.attempt"]) == (run["run"], "1")


def test_ray_job_stop_ends_in_a_terminal_state(orc: Orc) -> None:
    entry = ("python", "-m", "orchestrator.launch", "train", "train=trains:slow")
    job = _ray_job(
        orc, "submit", "--submission-id", "slow-1", "--no-wait", "--working-dir", ".", "--", *entry, cwd=PROJECT
    )
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0, out
    store = orc.store()

    def logging() -> str:
        runs = [row.run for row in store.runs(limit=5) if row.job == "slow-1"]
        return runs[0] if runs and store.summaries(runs[0]) else ""

    run = wait_until(logging, 60, "the job's run logging")
    stop = _ray_job(orc, "stop", "slow-1")
    out, _ = stop.communicate(timeout=60)
    assert stop.returncode == 0, out
    wait_until(lambda: store.run(run).status.is_terminal, 30, "a terminal state")
    assert store.run(run).status.value == "CANCELLED"
    points = store.points(run, "count", rank=0)
    assert points.values.tolist() == list(range(len(points)))


def test_the_cluster_refuses_who_has_no_token(orc: Orc) -> None:
    url = f"{orc.stack.ray_dashboard}/api/jobs/"
    for headers, code in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10)
        assert refused.value.code == code
    assert os.stat(orc.stack.ray_token_path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["experiment=digits", "resorces.workers=2"], "resources"),
        (["experiment=digits", "resources.wokers=2"], "resources.workers"),
        (["experiment=digits", "resources.workers=two"], "resources.workers"),
        (["experiment=digits", "resources.workers=64"], "resources.workers"),
        (["experiment=digits", "resources.gpus_per_worker=1"], "gpus"),
        (["experiment=digits", "storage.url=/proc/nothing"], "storage.url"),
        (["experiment=digits", "epochs=many"], "epochs"),
        (["experiment=didgits"], "digits"),
        (["train=trains:slwo"], "slow"),
        (["train=nosuchmodule:train"], "nosuchmodule"),
        ([], "train"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_created(orc: Orc, words: list[str], named: str) -> None:
    before = [row.run for row in orc.store().runs(limit=1000)]
    directories = sorted((orc.home / "runs").rglob("*")) if (orc.home / "runs").exists() else []
    shown = orc("run", *words, code=2)
    assert named in shown
    assert "Traceback" not in shown
    assert [row.run for row in orc.store().runs(limit=1000)] == before
    assert (sorted((orc.home / "runs").rglob("*")) if (orc.home / "runs").exists() else []) == directories
