"""`orc submit` from a project that is not ours, over connections that break."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from ray.job_submission import JobSubmissionClient

from tests.plugins.broken_wire import BrokenWire, Fault
from tests.plugins.runs import Orc, wait_until

TRAIN = """
import os
import time
from dataclasses import dataclass

from actors.critics import Critic
from jobs import LEARNING_RATE


@dataclass
class Config:
    seconds: float = 0.0


def train(run, cfg: Config):
    import cluster

    run.tags({"colour": os.environ.get("COLOUR", ""), "data": str(os.path.exists("data")), "cluster": cluster.__file__})
    end, n = time.monotonic() + cfg.seconds, 0
    while not run.report({"value": Critic().value * LEARNING_RATE}) and time.monotonic() < end:
        run.log({"n": n}, step=n)
        n += 1
        time.sleep(0.1)
"""


AUTHOR = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own, with folders of the names of ours and 60 MB of data that git ignores."""
    root = tmp_path_factory.mktemp("theirs") / "project"
    contents = {
        "train_it.py": TRAIN,
        "jobs/__init__.py": "LEARNING_RATE = 0.25\n",
        "actors/__init__.py": "",
        "actors/critics.py": "class Critic:\n    value = 2.0\n",
        "cluster/__init__.py": "",
        ".gitignore": "data/\n",
    }
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for directory in (root / "data", root.parent / "heavy"):
        directory.mkdir()
        with (directory / "images.bin").open("wb") as data:
            data.truncate(60_000_000)
    for words in (["init", "-q"], ["add", "."], [*AUTHOR, "commit", "-qm", "all of it"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    return root


@pytest.fixture(scope="module")
def wire(orc: Orc) -> Iterator[BrokenWire]:
    """Loses the answer to the first job that is sent, and the first connection that follows a log."""
    server = urlsplit(orc.stack.ray_dashboard)
    faults = [Fault(request="POST /api/jobs/"), Fault(request="/logs/tail", after_bytes=500)]
    assert server.hostname
    assert server.port
    with BrokenWire(server.hostname, server.port, faults) as wire:
        yield wire


@pytest.fixture(scope="module")
def jobs(orc: Orc) -> JobSubmissionClient:
    token = Path(orc.stack.ray_token_path).read_text().strip()
    return JobSubmissionClient(orc.stack.ray_dashboard, headers={"Authorization": f"Bearer {token}"})


Submit = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def submit(orc: Orc, wire: BrokenWire, project: Path) -> Submit:
    """As on a laptop: an address and a token, no stack, the project as the working directory."""

    def start(*words: str, **more: str) -> subprocess.Popen[str]:
        elsewhere = {"ORC_HOME": str(project.parent / "no-stack"), "RAY_AUTH_TOKEN_PATH": orc.stack.ray_token_path}
        return orc.start("submit", *words, "--address", wire.url, cwd=project, **(elsewhere | more))

    return start


@pytest.fixture(scope="module")
def first(submit: Submit) -> tuple[str, str]:
    """What the first job's submission printed: stdout and stderr."""
    process = submit("train=train_it:train", "--name", "theirs", "--id", "theirs-1", "--env", "COLOUR", COLOUR="red")
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, out + err
    return out, err


def test_a_job_of_somebody_elses_project_finishes(orc: Orc, first: tuple[str, str], project: Path) -> None:
    (row,) = [row for row in orc.store().runs(limit=100) if row.job == "theirs-1"]
    assert (row.status, row.name) == ("FINISHED", "theirs")
    tags = orc.store().tags(row.run)
    assert (tags["colour"], tags["data"]) == ("red", "False")
    assert "_ray_pkg_" in tags["cluster"], "their own cluster/ was imported, not ours"
    assert orc.store().points(row.run, "value", rank=1).values.tolist() == [0.5]
    (attempt,) = orc.store().attempts(row.run)
    commit = subprocess.run(
        ["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert attempt.provenance["git"]["commit"] == commit.stdout.strip(), "although .git stayed here"


def test_a_lost_answer_and_a_lost_connection_make_one_job_and_no_line_twice(
    orc: Orc, first: tuple[str, str], wire: BrokenWire, jobs: JobSubmissionClient
) -> None:
    out, _ = first
    assert [fault.happened for fault in wire.faults] == [True, True]
    assert len([line for line in wire.requests if line.endswith("/logs/tail")]) > 1
    assert out == jobs.get_job_logs("theirs-1") + "job theirs-1 SUCCEEDED\n"
    assert len([row for row in orc.store().runs(limit=100) if row.name == "theirs"]) == 1


def test_everybody_who_lists_jobs_names_the_same_run(
    orc: Orc, first: tuple[str, str], jobs: JobSubmissionClient
) -> None:
    row = orc.store().run("theirs")
    assert row.job == "theirs-1"
    assert [attempt.job for attempt in orc.store().attempts(row.run)] == ["theirs-1"]
    info = jobs.get_job_info("theirs-1")
    wanted = {"orc.run": row.run, "orc.name": "theirs", "orc.experiment": row.experiment, "orc.user": row.user}
    assert wanted.items() <= (info.metadata or {}).items()
    assert f"--run-id {row.run}" in info.entrypoint
    assert [job.metadata for job in jobs.list_jobs() if job.submission_id == "theirs-1"] == [info.metadata]
    assert _state_api(orc)["theirs-1"] == info.metadata
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(orc.stack.mlflow_uri)

    def mirrored() -> list[Any]:
        experiments = [e.experiment_id for e in client.search_experiments()]
        return client.search_runs(experiments, filter_string=f"tags.`orc.run_id` = '{row.run}'")

    (found,) = wait_until(mirrored, 30, "the run in MLflow")
    assert found.data.tags["orc.job"] == "theirs-1"


def _state_api(orc: Orc) -> dict[str, dict[str, str]]:
    code = (
        "import json; from ray.util.state import list_jobs\n"
        "print(json.dumps({job.submission_id: job.metadata for job in list_jobs(detail=True) if job.submission_id}))"
    )
    environment = orc.own.environment | orc.stack.client_environment()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_id_again_shows_the_same_job(
    first: tuple[str, str], submit: Submit, wire: BrokenWire, jobs: JobSubmissionClient
) -> None:
    words = ("train=train_it:train", "--name", "theirs", "--id", "theirs-1", "--env", "COLOUR")
    before = len(jobs.list_jobs())
    again = submit(*words, "--json", COLOUR="red")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    document = json.loads(out)
    assert (document["job"], document["status"], document["exit_code"]) == ("theirs-1", "SUCCEEDED", 0)
    assert jobs.get_job_logs("theirs-1") in err
    other = submit("seconds=3", *words, COLOUR="red")
    _, err = other.communicate(timeout=60)
    assert (other.returncode, "another config" in err) == (2, True), err
    assert len(jobs.list_jobs()) == before
    assert len([line for line in wire.requests if line.startswith("PUT /api/packages/")]) == 1


def test_a_job_goes_on_without_its_watcher_and_its_end_is_told_to_the_next(
    orc: Orc, first: tuple[str, str], submit: Submit, wire: BrokenWire, jobs: JobSubmissionClient
) -> None:
    words = ("train=train_it:train", "seconds=60", "--id", "theirs-2")
    detached = submit(*words, "--detach", "--json")
    out, err = detached.communicate(timeout=60)
    assert detached.returncode == 0, err
    run = json.loads(out)["run"]
    uploads = [line for line in wire.requests if line.startswith("PUT /api/packages/")]
    assert len(uploads) == 1, "the same content is sent once"

    watcher = submit(*words)
    store = orc.store()
    wait_until(lambda: [row for row in store.runs(limit=5) if row.run == run], 60, "the run whose id was told")
    wait_until(lambda: store.summaries(run), 60, "its first points")
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=30)
    assert watcher.returncode == 130
    assert f"orc cancel {run}" in err
    assert jobs.get_job_status("theirs-2") == "RUNNING"

    watcher = submit(*words)
    jobs.stop_job("theirs-2")
    out, err = watcher.communicate(timeout=60)
    assert (watcher.returncode, "job theirs-2 STOPPED" in out) == (130, True), out + err
    assert store.run(run).status == "CANCELLED"


@pytest.mark.parametrize(
    ("words", "files", "named"),
    [
        (["resources.workers=64"], [], "resources.workers"),
        (["secnods=3"], [], "seconds"),
        (["--working-dir", "../heavy", "submit.max_mb=59"], [], "--exclude /images.bin"),
        ([], ["torch.py"], "torch.py"),
        ([], ["ray/__init__.py"], "ray/__init__.py"),
        (["--env", "MY_SECRET"], [], "looks like a secret"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    submit: Submit, wire: BrokenWire, project: Path, words: list[str], files: list[str], named: str
) -> None:
    sent = len([line for line in wire.requests if line.startswith(("PUT", "POST"))])
    train = "train=os.path:join" if "../heavy" in words else "train=train_it:train"
    for name in files:
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    try:
        process = submit(train, *words, MY_SECRET="hunter2222")
        out, err = process.communicate(timeout=60)
    finally:
        for name in files:
            (project / name).unlink()
    assert process.returncode == 2, out + err
    assert named in err
    assert "hunter2222" not in out + err
    assert len([line for line in wire.requests if line.startswith(("PUT", "POST"))]) == sent


@pytest.mark.parametrize("token", ["", "wrong-wrong-wrong-wrong"])
def test_who_has_no_token_is_told_which_variable_holds_it(submit: Submit, token: str) -> None:
    process = submit("train=train_it:train", RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN=token)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, out + err
    assert "RAY_AUTH_TOKEN_PATH" in err
    assert "Traceback" not in err
