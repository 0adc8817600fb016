"""`orc sweep`: its verbs, the plan that is shown, what is refused, what is asked of a sweep, and its lines in a log."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import launch
from orchestrator.cli import main, parser, submit, sweep, sweep_plan, sweep_show
from orchestrator.cli.sweep_display import LineSweep
from orchestrator.config import ClusterCapacity, NodeCapacity
from orchestrator.config.settings import PricesConfig
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.execution import sweep_api
from orchestrator.execution.sweep_place import Patient, driver_name, outlook_of
from orchestrator.execution.sweep_plan import trial_spec, unmeasured
from orchestrator.records import RunSpec, RunTicket
from orchestrator.sweep_records import SweepSpec, TrialRow
from orchestrator.sweeps.budget import Gang, Work
from orchestrator.sweeps.summary import Left, SweepView
from orchestrator.sweeps.template import template
from orchestrator.sweeps.warm import Warm

TRAIN = "train=searched_here:train"
FOUR_CPUS = ClusterCapacity(nodes=(NodeCapacity(cpus=4, gpus=0, memory_gb=16),))


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "searched_here.py").write_text("def train(run, cfg):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "searched_here", raising=False)
    return tmp_path


def planned(*words: str, capacity: ClusterCapacity | None = FOUR_CPUS, place: str = "ray") -> Any:
    made, space = template([TRAIN, *words])
    return outlook_of(made, space, capacity, place)


# -- verbs


def test_sweep_is_a_verb_and_a_group_of_verbs() -> None:
    assert parser.parse(["sweep", "lr=0.1,0.2", "sweep.samples=3"])[1].overrides == ["lr=0.1,0.2", "sweep.samples=3"]
    verb, arguments = parser.parse(["sweep", "resume", "last", "--local"])
    assert (verb.name, arguments.sweep, arguments.local) == ("sweep resume", "last", True)
    assert parser.parse(["sweep", "extend", "S", "+20"])[1].more == ["+20"]
    assert parser.parse(["sweep", "stop", "S"])[1].trials == []
    assert parser.parse(["sweep", "hold", "S", "3", "4"])[1].trials == [3, 4]


def test_a_mistyped_second_word_is_no_override() -> None:
    with pytest.raises(parser.UsageError, match="Did you mean 'resume'"):
        parser.parse(["sweep", "resum", "last"])


def test_every_verb_of_sweeps_has_its_function() -> None:
    verbs = [verb for verb in parser.VERBS if verb.name.split()[0] == "sweep"]
    assert len(verbs) == 13
    assert all(callable(main.action(verb)) for verb in verbs)


# -- the plan


def test_the_plan_says_how_many_how_large_how_many_at_once_and_why() -> None:
    plan = planned(
        "lr=loguniform(1e-4,1e-1)", "hidden=16,32,64", "epochs=15", "sweep.samples=16", "sweep.scheduler=asha",
        "sweep.objective=[val/accuracy:max]", "resources.workers=2", "sweep.seeds=2",
    )  # fmt: skip
    assert (plan.trials, plan.at_once) == (48, 2)
    assert (plan.milestones, list(plan.most)) == ((1, 3, 9, 15), [48, 16, 5, 1])
    assert (plan.resource, plan.whole_resource) == (2 * (48 + 2 * 16 + 6 * 5 + 6), 2 * 48 * 15)
    text = "\n".join(sweep_plan.lines(plan))
    parts = (
        "48 trials, 16 × 3 of the grid, each with 2 seeds", "loguniform 0.0001 … 0.1", "grid 16, 32, 64",
        "2 at once: 4 CPUs hold 2 groups of 2", "1, 3, 9, 15 units (reduction 3)", "val/accuracy, higher is better",
    )  # fmt: skip
    assert [part for part in parts if part not in text] == []


def test_fewer_at_once_than_there_is_room_for_if_somebody_says_so_and_never_more() -> None:
    words = ("lr=0.1,0.2,0.3,0.4,0.5,0.6", "resources.workers=1")
    assert planned(*words).at_once == 4
    assert planned(*words, "sweep.concurrency=3").at_once == 3
    plan = planned(*words, "sweep.concurrency=9")
    assert plan.at_once == 4
    assert "more than there is room for" in plan.why
    assert planned("lr=0.1,0.2", "resources.workers=1").at_once == 2, "no more than there are trials"


def test_a_dry_run_starts_nothing_and_refuses_what_could_never_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "--local", "--dry-run", TRAIN, "lr=0.1,0.2", "resources.workers=1"]
    assert main.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trials"], told["space"]) == (2, {"lr": "grid 0.1, 0.2"})
    assert not (project / "home").exists()
    assert main.main([*words, "resources.workers=4096"]) == 2
    assert "4096" in capsys.readouterr().err
    for wrong, named in (
        (["lr=loguniforn(1,2)"], "loguniform"),
        (["lr=uniform(1,0)"], "lr"),
        (["sweep.scheduler=asha"], "sweep.asha.max"),
        (["sweep.searcher=rndom"], "random"),
        (["sweep.scheduler=ashaa"], "asha"),
        (["sweep.budget.kwh=1"], "measures no energy"),
        (["resources.workers={min: 1, max: 2}"], "resources.min_workers"),
    ):
        assert main.main([*words, *wrong]) == 2, wrong
        assert named in capsys.readouterr().err


def test_the_plan_counts_given_points_and_those_of_earlier_runs() -> None:
    made, space = template([TRAIN, "lr=uniform(0,1)", "sweep.samples=4", "sweep.points=[{lr: 0.5},{lr: 0.25}]"])
    assert "6 trials, 2 of them given" in sweep_plan.lines(outlook_of(made, space, FOUR_CPUS, "ray"))[0]
    found = Warm(known=(({"lr": 0.1}, [1.0]),) * 9, left_out={"did not finish": 2}, points=1)
    plan = outlook_of(made, space, FOUR_CPUS, "ray", found)
    text = "\n".join(sweep_plan.lines(plan))
    assert "1 of them given, 1 of them from earlier runs" in text
    assert "the best 1 of 9 earlier results are tried again;  left out: 2 (did not finish)" in text
    document = sweep_plan.document(plan)
    assert (document["points"], document["warm_points"], document["warm_results"]) == (2, 1, 0)


def test_the_plan_of_a_sweep_that_goes_on_says_what_is_left() -> None:
    rest = Left(trials=15, seconds=720, money=0.4, currency="USD")
    plan = planned("lr=uniform(0,1)", "sweep.samples=20")
    assert sweep_plan.document(plan)["left"] is None
    assert any(line.split() == ["time", *sweep_plan.UNKNOWN.split()] for line in sweep_plan.lines(plan))
    text = sweep_plan.lines(plan, sweep_plan.SoFar(words="5 of 20 trials are over", left=rest))
    assert "  left       about 12 min and 0.40 USD for the 15 trials that are left" in text
    assert not any("unknown" in line for line in text)


def test_a_configuration_that_searches_is_validated_with_its_plan(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["config", "validate", TRAIN, "lr=0.1,0.2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("valid: a sweep of searched_here:train\n")
    assert "2 trials" in shown
    assert main.main(["config", "validate", TRAIN, "lr=0.1", "--json"]) == 0
    assert "sweep" not in json.loads(capsys.readouterr().out)
    (project / "conf" / "experiment").mkdir(parents=True)
    (project / "conf" / "experiment" / "wide.yaml").write_text(
        "# @package _global_\ntrain: searched_here:train\nlr: 0.1\nsweep: {samples: 7, space: {lr: 'uniform(0,1)'}}\n"
    )
    words = ["config", "validate", "--config-dir", str(project / "conf"), "experiment=wide", "--json"]
    assert main.main(words) == 0
    assert json.loads(capsys.readouterr().out)["sweep"]["trials"] == 7
    for wrong in ("sweep.budget.kwh=1", "sweep.scheduler=ashaa"):
        assert main.main(["config", "validate", TRAIN, "lr=0.1,0.2", wrong]) == 2
    assert not (project / "home").exists()


def test_energy_is_limited_only_where_gpus_tell_it() -> None:
    def why(workers_gpus: int, *gpus: int, monitoring: float = 10.0) -> str:
        made, _ = template([TRAIN, "lr=0.1,0.2", f"resources.gpus_per_worker={workers_gpus}"])
        nodes = tuple(NodeCapacity(cpus=4, gpus=count, memory_gb=16) for count in gpus)
        return unmeasured(made.base.settings, ClusterCapacity(nodes=nodes) if nodes else None, monitoring)

    assert why(1, 0, 8) == why(1) == ""
    assert "no node has a GPU" in why(1, 0, 0)
    assert "its workers use no GPU" in why(0, 8)
    assert "not sampled" in why(1, 8, monitoring=0.0)


def test_a_submitted_job_launches_the_same_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = [TRAIN, "lr=choice(0.1,0.2)", "sweep.samples=2", "resources.workers=1"]
    assert submit.chosen_kind(["sweep", *words]) == ("sweep", words)
    command = shlex.split(submit.entrypoint("sweep", words, run="20261122-000000-0000000a"))
    assert command[:-2] == ["python", "-m", "orchestrator.launch", "sweep", *words]
    assert launch.main(["sweep", *words, "--local", "--dry-run"]) == 0
    assert "2 trials" in capsys.readouterr().out
    assert launch.main(["sweep", "resum"]) == 2


# -- what a trial is told


def test_a_trials_run_is_named_after_the_sweep_and_has_its_own_values_and_seed() -> None:
    made, _ = template([TRAIN, "lr=0.1,0.2", "run.seed=7"])
    parent = RunSpec(experiment="e", run="", new_run="20261122-000000-0000000a", storage_url="/runs", resume=True)
    ticket = RunTicket(run="20261122-000000-0000000a", name="brave-owl-3", experiment="e", attempt=1, directory="/d")
    specs = [trial_spec(parent, ticket, made.job({"lr": 0.2}), 4, repeat) for repeat in (0, 1)]
    assert [spec.name for spec in specs] == ["brave-owl-3-4", "brave-owl-3-4.1"]
    assert [spec.seed for spec in specs] == [7, 8]
    assert {(spec.parent, spec.sweep, spec.resume) for spec in specs} == {(ticket.run, ticket.run, False)}
    assert specs[0].params["lr"] == 0.2
    assert len({spec.new_run for spec in specs} | {ticket.run}) == 3


# -- what is asked


def test_words_become_what_a_request_says() -> None:
    words = ["sweep.concurrency=2", "sweep.budget.hours=1.5", "lr=uniform(0,1)", "sweep.space.hidden=8,16"]
    assert sweep.settings_of(words) == {
        "concurrency": 2, "budget.hours": 1.5, "space": {"lr": "uniform(0,1)", "hidden": "8,16"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"sweep\.samples"):
        sweep.settings_of(["sweep.samples=many"])


def test_a_driver_that_died_on_this_host_is_known_to_be_gone() -> None:
    ticket = RunTicket(run="r", name="n", experiment="e", attempt=2, directory="/d")
    mine = driver_name(ticket)
    assert not sweep.is_gone(mine)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert sweep.is_gone(mine.replace(f"/{os.getpid()}/", f"/{ended.pid}/"))
    assert not sweep.is_gone("another-host/1/1-abc"), "its lease tells"
    assert not sweep.is_gone("")


# -- what is shown


def view(*trials: TrialRow, **more: Any) -> SweepView:
    return SweepView(sweep="s", objectives=(("val/accuracy", "max"),), unit="epoch", trials=trials, **more)


def trial(number: int, status: str, score: float | None = None, **more: Any) -> TrialRow:
    return TrialRow(number=number, values={"lr": 0.5 / (number + 1)}, status=status, score=score, **more)


def test_a_log_gets_one_line_for_each_job_that_ended_and_none_twice() -> None:
    stream = io.StringIO()
    display = LineSweep(stream)
    display.sweep(view())
    display.sweep(view(trial(0, "running")))
    waiting = trial(0, "waiting", 0.8, resource=1.0, scores={"rungs": [[0, 1, 0.8, 1]]})
    display.sweep(view(waiting, trial(1, "running")))
    display.sweep(view(waiting, trial(1, "failed", reason="ValueError: no")))
    display.sweep(view(waiting, trial(1, "failed", reason="ValueError: no")))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("trial 0")
    assert "0.8" in lines[0]
    assert lines[1].startswith("trial 1")
    assert "ValueError: no" in lines[1]


def test_what_is_left_is_told_once_when_the_first_trial_has_ended() -> None:
    stream = io.StringIO()
    display = LineSweep(stream)
    display.sweep(view(trial(0, "running"), samples=16))
    measured = Work(gang=Gang(cpus=2), at_once=2, lane_seconds=96.0, prices=PricesConfig(cpu_hour=0.5))
    done = trial(0, "complete", 0.8, scores={"rungs": [[0, 3, 0.8, 1]]})
    shown = view(done, trial(1, "running"), samples=16, work=measured)
    display.sweep(shown)
    display.sweep(shown)
    lines = stream.getvalue().splitlines()
    assert lines[1:] == ["left: about 12 min and 0.40 USD for the 15 trials that are left"]
    again = io.StringIO()
    LineSweep(again).sweep(shown)
    assert again.getvalue() == "", "its plan has said so"


def test_a_sweep_that_goes_on_does_not_tell_its_past_again() -> None:
    stream = io.StringIO()
    display = LineSweep(stream)
    done = trial(0, "complete", 0.8, scores={"rungs": [[0, 3, 0.8, 1]]})
    display.sweep(view(done))
    display.sweep(view(done, trial(1, "complete", 0.7, scores={"rungs": [[0, 3, 0.7, 1]]})))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1"]


def test_the_best_by_another_objective_of_the_sweep() -> None:
    rows = [
        trial(number, "complete", score, scores={"objectives": {"val/accuracy": score, "perf/step": speed}})
        for number, (score, speed) in enumerate([(0.9, 3.0), (0.8, 1.0), (0.7, 2.0)])
    ]
    shown = dataclasses.replace(view(*rows), objectives=(("val/accuracy", "max"), ("perf/step", "min")))
    assert [row.number for row in sweep_show.chosen(shown, 2, "")] == [0, 1]
    assert [row.number for row in sweep_show.chosen(shown, 2, "perf/step")] == [1, 2]
    with pytest.raises(UserError, match="perf/step"):
        sweep_show.chosen(shown, 1, "perf/stop")


# -- from Python


def test_the_python_call_is_the_command_line_in_other_words() -> None:
    train = importlib.import_module("searched_here").train
    words = sweep_api.words_of(
        train, {"optim.lr": "loguniform(1e-4,1e-1)"}, "val/accuracy:max", 8, "asha", 2,
        "mine", {"sweep__asha__max": 9, "batch_size": 16, "stopping__patience": 3, "stopping__metric": "val/loss"},
    )  # fmt: skip
    made, space = template(words)
    settings = made.base.settings
    assert settings.train == "searched_here:train"
    assert (settings.sweep.samples, settings.sweep.seeds, settings.sweep.asha.max) == (8, 2, 9)
    assert settings.sweep.objective == ["val/accuracy:max"]
    assert (settings.stopping.patience, settings.stopping.metric) == (3, "val/loss")
    assert made.job({"optim.lr": 0.01}).settings.stopping == settings.stopping
    assert (settings.run.name, made.base.user["batch_size"]) == ("mine", 16)
    assert [each.key for each in space.dimensions] == ["optim.lr"]


def test_a_function_that_no_worker_could_import_is_refused() -> None:
    with pytest.raises(UserError, match="module"):
        sweep_api.importable(lambda run, cfg: None)


# -- the tracker away


class Away:
    """A tracker that answers the third time."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked = 0
        self.error = error or ConnectionError("nobody there")

    def open_sweep(self, spec: SweepSpec, driver: str) -> Mapping[str, Any]:
        self.asked += 1
        if self.asked < 3:
            raise self.error
        return {"spec": spec, "driver": driver}


def test_a_sweep_waits_for_a_tracker_that_is_away_and_not_for_ever() -> None:
    spec = SweepSpec(sweep="s")
    over = threading.Event()
    away: Any = Away()
    assert Patient(away, over, pause=0.0).open_sweep(spec, "d")["driver"] == "d"  # type: ignore[index]
    assert away.asked == 3
    with pytest.raises(ConnectionError):
        Patient(Away(), over, patience=-1.0, pause=0.0).open_sweep(spec, "d")  # type: ignore[arg-type]
    over.set()
    with pytest.raises(ConnectionError):
        Patient(Away(), over, pause=0.0).open_sweep(spec, "d")  # type: ignore[arg-type]


def test_a_sweep_waits_longer_for_the_trackers_database_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    spec, over = SweepSpec(sweep="s"), threading.Event()
    error = ServiceUnavailable("postgresql", "db", "the server starts up.", "`orc status` tells.")
    away: Any = Away(error)
    assert Patient(away, over, patience=-1.0, pause=0.0).open_sweep(spec, "d")["driver"] == "d"  # type: ignore[index]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "the server starts up" in caplog.text
    assert "goes on after 0 s" in caplog.text
    with pytest.raises(ServiceUnavailable):
        Patient(Away(error), over, outage=-1.0, pause=0.0).open_sweep(spec, "d")  # type: ignore[arg-type]
