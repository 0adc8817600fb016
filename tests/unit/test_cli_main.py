"""The command line as a whole: verbs, mistakes, exit codes, one JSON document, speed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import launch
from orchestrator.cli import main, parser
from orchestrator.cli.output import Output
from orchestrator.errors import ConfigError

NEEDED = {
    "cancel": ["r1"], "config diff": ["r1"], "db backup": ["backup.orc"], "db restore": ["backup.orc"],
    "checkpoint pin": ["r1@best"], "checkpoint unpin": ["r1@best"], "checkpoint rm": ["r1@best", "--yes"],
}  # fmt: skip
CLUSTER = ("up", "down", "status", "doctor")

CLUSTER_MODULE = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "path": sys.path}))
sys.exit(1 if sys.argv[1] == "status" else 0)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, and a working directory with nothing of ours in it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    home = tmp_path / "home"
    monkeypatch.setenv("ORC_HOME", str(home))
    return home


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Application folders whose `cluster` tells what it was called with."""
    root = tmp_path / "application"
    (root / "cluster").mkdir(parents=True)
    (root / "cluster" / "__main__.py").write_text(CLUSTER_MODULE)
    monkeypatch.setattr("orchestrator.application.root", lambda: root)
    return root


@pytest.mark.parametrize("verb", parser.VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_its_function_and_its_help(verb: parser.Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(main.action(verb))
    assert main.main([*verb.name.split(), "--help"]) == 0
    assert f"usage: orc {verb.name}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [verb.name for verb in parser.VERBS])
def test_every_verb_gives_one_json_document_even_where_nothing_was_started(
    verb: str, home: Path, application: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main.main([*verb.split(), *NEEDED.get(verb, []), "--json"])
    shown = capfd.readouterr()
    document = json.loads(shown.out)
    assert "Traceback" not in shown.out + shown.err
    if "error" in document:
        assert code == 2
        assert shown.err.startswith("orc: ")
        assert document["error"]["message"] in shown.err
    assert not home.exists(), "nothing is half-created"


@pytest.mark.parametrize("verb", CLUSTER)
def test_service_verbs_run_our_cluster_folder_and_pass_its_exit_code_on(
    verb: str, home: Path, application: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (Path.cwd() / "cluster").mkdir()
    (Path.cwd() / "cluster" / "__main__.py").write_text("raise SystemExit('the user\\'s own cluster folder')")
    settings = ["ray.num_cpus=2"] if verb == "up" else []
    assert main.main(["--home", str(home), verb, *settings, "--json"]) == (1 if verb == "status" else 0)
    called = json.loads(capfd.readouterr().out)
    assert called["arguments"] == [verb, "--home", str(home), *settings, "--json"]
    assert str(Path.cwd()) not in called["path"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lss"], "there is no verb 'lss'. Did you mean 'ls'?"),
        (["db", "bakup"], "Did you mean 'backup'?"),
        (["config"], "config what?"),
        (["ls", "--experimnt", "x"], "Did you mean '--experiment'?"),
        (["--hme", "x", "ls"], "Did you mean '--home'"),
        (["ls", "--limit", "0"], "'0' is no positive number"),
        (["ls", "--status", "runing"], "Did you mean 'running'?"),
        (["ls", "--tag", "team"], "write NAME=VALUE"),
        (["cancel"], "RUN"),
        (["checkpoint"], "usage: orc checkpoint {ls|show|verify|export|pin|unpin|rm|gc|rebuild}"),
        (["checkpoint", "verfy"], "Did you mean 'verify'?"),
        (["checkpoint", "rm"], "RUN@NAME"),
        (["checkpoint", "gc", "x", "--experiment", "y"], "a RUN or --experiment, not both"),
        (["checkpoint", "gc", "--keep-last", "0"], "'0' is no positive number"),
        (["checkpoint", "gc", "--quota-gb", "-1"], "no number from 0 up"),
        (["checkpoint", "export", "x", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["checkpoint", "show", "./nowhere"], "There is no such directory."),
        (["logs", "x", "--follow", "--json"], "choose one"),
        (["logs", "x", "--rank", "first"], "a number from 0 up, or `all`"),
        (["metrics", "x", "--format", "csv", "--json"], "choose one"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(
    words: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("orc: ")
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_options_of_all_verbs_may_stand_before_or_after_the_verb(tmp_path: Path) -> None:
    for words in (["--home", str(tmp_path), "--json", "ls"], ["ls", "--home", str(tmp_path), "--json"]):
        _, arguments = parser.parse(words)
        assert (arguments.home, arguments.json, arguments.debug) == (tmp_path, True, False)


def test_overrides_and_options_may_be_mixed() -> None:
    _, arguments = parser.parse(["run", "a=1", "--name", "x", "+b=2", "--config-dir", "conf", "~c"])
    assert (arguments.overrides, arguments.name, arguments.config_dir) == (["a=1", "+b=2", "~c"], "x", "conf")


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ConfigError("optim.lr", "x", "is no number."), 2),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a defect"), 1),
        (BrokenPipeError("of a server, not of stdout"), 1),
        (None, 0),
    ],
)
def test_what_a_verb_raises_becomes_the_exit_code(
    raised: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(arguments: argparse.Namespace, output: Output) -> int:
        if raised is not None:
            raise raised
        return 0

    monkeypatch.setattr(main, "action", lambda verb: act)
    assert main.main(["ls"]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert main.main(["ls", "--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) == isinstance(raised, Exception)


def test_a_reader_that_leaves_early_causes_no_noise(tmp_path: Path) -> None:
    script = "import sys; from orchestrator.cli import main; sys.exit(main.main(['version']))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(30) == main.READER_LEFT
    assert process.stderr.read() == b""
    process.stderr.close()


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = "from orchestrator.cli import main; main.main(['--help']); import sys; print(*sys.modules, file=sys.stderr)"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    elapsed = time.perf_counter() - started
    loaded = set(done.stderr.split())
    assert "usage: orc" in done.stdout
    assert loaded & {"numpy", "rich", "sqlalchemy", "hydra", "ray", "torch", "mlflow"} == set()
    assert elapsed < 2.0, "an interpreter and argparse; far more than that means something heavy was imported"


def test_launching_something_unknown_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["trian", "a=1"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_launching_a_training_is_orc_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []

    def act(arguments: argparse.Namespace, output: Output) -> int:
        seen.append((arguments.name, arguments.overrides))
        return 1

    monkeypatch.setattr(main, "action", lambda verb: act)
    assert launch.main(["train", "experiment=digits", "--name", "n"]) == 1
    assert seen == [("n", ["experiment=digits"])]


def test_the_entry_point_of_jobs_refuses_bad_input_like_orc(tmp_path: Path) -> None:
    root = Path(launch.__file__).parents[1]
    words = [sys.executable, "-m", "jobs.train", "train=nowhere:train", "--home", str(tmp_path / "home")]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("orc: train = 'nowhere:train'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home").exists()
