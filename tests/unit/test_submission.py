"""`orc submit` before anything is sent, and what becomes of a job's status and output. No cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli import submit
from orchestrator.errors import ConfigError, ServiceUnavailable, UserError
from orchestrator.execution import submission, upload
from orchestrator.execution.submission import Follower, JobState, SubmissionFailed
from orchestrator.execution.upload import Found, ShadowedModule, TooLarge, selected
from orchestrator.stack import Stack

STACK = Stack(home="/home/ann/.orc", ray_dashboard="http://127.0.0.1:8265", ray_token_path="/home/ann/.orc/ray_token")


def tree(root: Path, *paths: str, **contents: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x")
    for name, text in contents.items():
        (root / name.replace("__", "/").replace("_ignore", ".gitignore")).write_text(text)
    return root


def names(root: Path, *exclude: str) -> list[str]:
    return [file.path for file in selected(root, exclude)]


# -- which files


def test_code_travels_and_what_nobody_means_by_code_stays(tmp_path: Path) -> None:
    tree(tmp_path, "train.py", "jobs/a.py", ".git/config", "jobs/__pycache__/a.pyc", "venv/lib/x.py", "env3/pyvenv.cfg")
    tree(tmp_path, "env3/lib/y.py", ".mypy_cache/z", "conf/digits.yaml", "data/one.bin", "home/orc/points")
    os.mkfifo(tmp_path / "pipe")
    hidden = [tmp_path / "home" / "orc"]
    assert [file.path for file in selected(tmp_path, ["data/"], hidden)] == [
        "conf/digits.yaml",
        "jobs/a.py",
        "train.py",
    ]


GITIGNORES = {
    "": "data/\n*.pt\n!keep.pt\n/top.txt\n# comment\n\\!odd\nspace \nlogs/**/*.log\n[xy].bin\n",
    "sub": "!data/\nnot_here\n/anchored\n**/deep\nquestion?.c\n",
    "sub/inner": "*\n!.gitignore\n!only.py\n",
}


def test_ignore_files_mean_what_git_says(tmp_path: Path) -> None:
    """Nested files, negation, anchors, wildcards; seen from the top and from a directory inside the repository."""
    if shutil.which("git") is None:
        pytest.fail("git is needed to compare with")
    tree(tmp_path, "data/a", "b.pt", "keep.pt", "top.txt", "sub/top.txt", "!odd", "space", "logs/x/y.log", "logs/z.log")
    tree(tmp_path, "x.bin", "z.bin", "sub/data/a", "sub/not_here", "sub/anchored", "sub/a/anchored", "sub/a/deep/f")
    tree(tmp_path, "sub/question1.c", "sub/question.c", "sub/inner/only.py", "sub/inner/b.py", "sub/inner/c/only.py")
    for directory, text in GITIGNORES.items():
        (tmp_path / directory / ".gitignore").write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("z.bin\n")
    for directory in (tmp_path, tmp_path / "sub"):
        listed = subprocess.run(
            ["git", "-C", str(directory), "ls-files", "-zo", "--exclude-standard"],
            capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(tmp_path)},
        ).stdout  # fmt: skip
        assert names(directory) == sorted(path for path in listed.split("\0") if path)
    shutil.rmtree(tmp_path / ".git")
    assert "sub/inner/only.py" in names(tmp_path), "ignore files count without git, too"
    assert not {"data/a", "sub/inner/b.py"} & set(names(tmp_path))


def test_excludes_win_over_everything_and_a_rayignore_counts(tmp_path: Path) -> None:
    tree(tmp_path, "a.py", "b.csv", "c/d.csv", "e.txt", _ignore="!b.csv\n")
    (tmp_path / ".rayignore").write_text("e.txt\n")
    assert names(tmp_path, "*.csv") == [".gitignore", ".rayignore", "a.py"]


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    shared = tree(tmp_path / "shared", "lib.py")
    project = tree(tmp_path / "project", "a.py")
    (project / "common").symlink_to(shared)
    (project / "me").symlink_to(project)
    (project / "nowhere").symlink_to(tmp_path / "missing")
    assert names(project) == ["a.py", "common/lib.py"]


def test_a_directory_that_is_no_project_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MOST_FILES", 2)
    with pytest.raises(UserError, match="--working-dir"):
        selected(tree(tmp_path, "a", "b", "c"))


# -- may they travel


def test_too_much_data_names_the_option_that_mends_it() -> None:
    files = [Found("train.py", 10), Found("src/model.py", 10), Found("src/data/a.bin", 40_000_000)]
    files += [Found("images/b.bin", 20_000_000), Found("src/weights.pt", 2_000_000), Found("notes/c.txt", 5)]
    with pytest.raises(TooLarge) as refused:
        upload.check_size(Path("/p"), files, 50.0)
    assert refused.value.heaviest == (("/src/data/", 40_000_000),)
    assert "--exclude /src/data/" in str(refused.value)
    assert "submit.max_mb=63" in str(refused.value)
    with pytest.raises(TooLarge) as refused:
        upload.check_size(Path("/p"), files, 1.5)
    assert [pattern for pattern, _ in refused.value.heaviest] == ["/src/data/", "/images/", "/src/weights.pt"]
    assert upload.check_size(Path("/p"), files, 70.0) == 62_000_025


@pytest.mark.parametrize(
    "path",
    ["orchestrator/__init__.py", "ray/__init__.py", "torch.py", "numpy.cpython-311-x86_64-linux-gnu.so", "random.py"],
)
def test_a_file_that_hides_a_module_of_the_job_is_refused_by_name(path: str, tmp_path: Path) -> None:
    with pytest.raises(ShadowedModule) as refused:
        upload.check_names(tmp_path, [Found("train.py", 1), Found(path, 1)], ours=Path("/usr/lib/orchestrator"))
    assert path in str(refused.value)
    assert f"--exclude /{path}" in str(refused.value)


def test_a_users_own_packages_are_welcome(tmp_path: Path) -> None:
    mine = ["jobs/__init__.py", "actors/__init__.py", "cluster/__init__.py", "cluster.py", "src/torch.py", "ray/a.txt"]
    mine += ["tests/__init__.py", "test/__init__.py", "setup.py", "time.py", "mlflow/runs/meta.yaml"]
    upload.check_names(tmp_path, [Found(path, 1) for path in mine], ours=Path("/usr/lib/orchestrator"))


def test_the_checkout_that_runs_may_be_submitted(tmp_path: Path) -> None:
    (tmp_path / "orchestrator").mkdir()
    upload.check_names(tmp_path, [Found("orchestrator/__init__.py", 1)], ours=tmp_path / "orchestrator")


def test_the_same_content_is_the_same_archive(tmp_path: Path) -> None:
    archives = []
    for copy in ("one", "two"):
        project = tree(tmp_path / copy, "a.py", "b/run.sh")
        (project / "b" / "run.sh").chmod(0o755)
        os.utime(project / "a.py", (len(archives), 1_000_000 * len(archives)))
        hashed = upload.pack(project, selected(project), tmp_path / f"{copy}.zip")
        archives.append((hashed, (tmp_path / f"{copy}.zip").read_bytes()))
    assert archives[0] == archives[1]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read("a.py") == b"x"
        assert [entry.external_attr >> 16 & 0o777 for entry in archive.infolist()] == [0o644, 0o755]


# -- what is asked of the job server


def test_the_stacks_token_goes_to_the_stacks_own_server_only() -> None:
    address, variables = submission.job_server("", {}, STACK)
    assert (address, variables["RAY_AUTH_TOKEN_PATH"]) == (STACK.ray_dashboard, STACK.ray_token_path)
    address, variables = submission.job_server("head:8265", {}, STACK)
    assert address == variables["RAY_API_SERVER_ADDRESS"] == "http://head:8265"
    assert not any("TOKEN" in name or name == "RAY_AUTH_MODE" for name in variables)


def test_a_laptop_needs_an_address_and_a_token(tmp_path: Path) -> None:
    there = {"RAY_API_SERVER_ADDRESS": "http://head:8265/", "RAY_AUTH_TOKEN": "t"}
    address, variables = submission.job_server("", there, None)
    assert (address, variables["RAY_AUTH_MODE"]) == ("http://head:8265", "token")
    with pytest.raises(UserError, match="--address"):
        submission.job_server("", {}, None)
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        submission.job_server("head:1", {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")}, None)
    with pytest.raises(UserError, match="no address"):
        submission.job_server("ray://head:10001", {}, None)


def test_the_job_repeats_the_command_with_its_quotes() -> None:
    assert submit.chosen_kind(["run", "a=1"]) == submit.chosen_kind(["a=1"]) == ("train", ["a=1"])
    assert submit.chosen_kind(["resume", "r1"]) == ("resume", ["r1"])
    command = submit.entrypoint("train", ["train=m:f", "note='a b'", "s=${oc.env:X}"], run="r1", config_dir="conf")
    assert command == (
        "python -m orchestrator.launch train train=m:f 'note='\"'\"'a b'\"'\"'' 's=${oc.env:X}'"
        " --config-dir conf --run-id r1"
    )


@pytest.mark.parametrize("word", ["db.password=hunter2", "+api_key=abc", "url=postgresql://me:pw@host/db"])
def test_no_secret_becomes_part_of_a_jobs_command(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        submit.check_no_secret(["epochs=3", word])
    assert "hunter2" not in str(refused.value)
    assert "oc.env" in str(refused.value)


def test_a_secret_may_be_named_and_numbers_are_none() -> None:
    submit.check_no_secret(["db.password=${oc.env:DB_PASSWORD}", "max_token=512", "epochs=3", "~old"])


def test_variables_travel_by_name_but_no_secrets() -> None:
    here = {"COLOUR": "red", "MY_TOKEN": "abc", "DB": "postgresql://me:pw@host/db"}
    assert submit.forwarded_variables(["COLOUR", "COLOUR"], here) == {"COLOUR": "red"}
    for name in ("MY_TOKEN", "DB"):
        with pytest.raises(UserError, match="looks like a secret") as refused:
            submit.forwarded_variables([name], here)
        assert here[name] not in str(refused.value)
    with pytest.raises(UserError, match="export MISSING"):
        submit.forwarded_variables(["MISSING"], here)


# -- how it goes


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 143, 143),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_jobs_own(status: str, code: int | None, wanted: int) -> None:
    assert submission.exit_code(JobState(id="a", status=status, exit_code=code)) == wanted


@pytest.mark.parametrize(("text", "fine"), [("run-1.a_B", True), ("", False), ("a/b", False), ("-a", False)])
def test_an_id_can_be_a_file_and_a_part_of_a_url(text: str, fine: bool) -> None:
    assert submission.is_job_id(text) is fine


class Wire:
    """A job server whose log connections end where the test says; "" is a moment without output."""

    address = "http://head:8265"

    def __init__(self, connections: list[list[str]], states: list[JobState | None | Exception], log: str = "") -> None:
        self._connections, self._states, self._log = iter(connections), iter(states), log

    def tail(self, job: str, every: float) -> Iterator[str]:
        yield from next(self._connections, [])

    def job(self, job: str) -> JobState | None:
        state = next(self._states)
        if isinstance(state, Exception):
            raise state
        return state

    def log(self, job: str) -> str:
        return self._log


def followed(wire: Wire, monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> tuple[str, Follower, list[str]]:
    told: list[str] = []
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: clock.append(seconds))
    start = JobState(id="job-1", status="PENDING")
    follower = Follower(wire, start, told.append, monotonic=lambda: sum(clock))  # type: ignore[arg-type]
    return "".join(follower), follower, told


RUNNING, DONE = JobState(id="job-1", status="RUNNING"), JobState(id="job-1", status="SUCCEEDED", exit_code=0)
GONE = ServiceUnavailable("the job server", "http://head:8265", "refused.", "")


def test_a_lost_connection_doubles_no_line_and_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = [["one\ntw"], ["one\n", "two\nthr"], ["one\ntwo\nthree\n"]]
    wire = Wire(connections, [GONE, GONE, RUNNING, DONE], log="one\ntwo\nthree\nfour\n")
    text, follower, told = followed(wire, monkeypatch, [])
    assert text == "one\ntwo\nthree\nfour\n"
    assert follower.state == DONE
    assert told == ["the connection is lost, the job goes on; trying again (refused)", "connected again"]


def test_following_is_given_up_when_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: list[float] = []
    with pytest.raises(ServiceUnavailable):
        followed(Wire([], [GONE] * 1000), monkeypatch, clock)
    assert submission.PATIENCE <= sum(clock) <= submission.PATIENCE + 5


def test_a_head_that_was_started_anew_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SubmissionFailed, match="started anew"):
        followed(Wire([["one\n"]], [None]), monkeypatch, [])


def test_why_a_job_waits_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = JobState(id="job-1", status="PENDING", message="It waits for its runtime environment.")
    clock = [0.0]

    class Slow(Wire):
        def job(self, job: str) -> JobState | None:
            clock.append(submission.LOOK)
            return super().job(job)

    wire = Slow([["", "", "", "", "go\n"]], [waiting, waiting, waiting, waiting, DONE], log="go\n")
    text, _, told = followed(wire, monkeypatch, clock)
    assert text == "go\n"
    assert told == [f"pending: {waiting.message}"]
