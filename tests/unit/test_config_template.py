"""One composed configuration, many trials: which overrides search, what is refused, and what a trial gets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config import compose
from orchestrator.errors import ConfigError, UserError
from orchestrator.sweeps.template import is_searched, template

FREE = "train=free_sweep:train"
TYPED = "train=typed_sweep:train"
FREE_CODE = "def train(run, cfg): ...\n"
TYPED_CODE = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Optim:
    lr: float = 0.1
    warm: float = 0.0

@dataclass
class Config:
    hidden: int
    epochs: int = 3
    layers: list[int] = field(default_factory=lambda: [4, 4])
    optim: Optim = field(default_factory=Optim)
    kind: str = "a"

def train(run, cfg: Config): ...
"""
OWN = """
# @package _global_
train: free_sweep:train
batch: 32
total: ${batch}
optim: {lr: 0.1, half: "${optim.lr}"}
sweep:
  samples: 4
  space:
    optim.lr: loguniform(1e-4, 1e-1)
    batch: {choice: [16, 32]}
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "free_sweep.py").write_text(FREE_CODE)
    (tmp_path / "typed_sweep.py").write_text(TYPED_CODE)
    for name, text in {
        "experiment/own": OWN,
        "model/small": "width: 8\n",
        "model/large": "width: 64\ndepth: 3\n",
    }.items():
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("free_sweep", "typed_sweep"):
        sys.modules.pop(name, None)


def refused(*overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        template(overrides)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=uniform(0,1)", True),
        ("lr=1,2", True),
        ("+lr=choice(a,b)", True),
        ("sweep.space.lr=uniform(0,1)", True),
        ("lr=[1,2]", False),
        ("~lr", False),
        ("note='a,b'", False),
        ("sweep.samples=3", False),
        ("experiment=digits", False),
    ],
)
def test_which_overrides_search(override: str, expected: bool) -> None:
    assert is_searched(override) is expected


def test_a_trial_is_the_same_work_as_a_run_with_its_values() -> None:
    given = [TYPED, "epochs=2"]
    made, space = template(
        [*given, "optim.lr=loguniform(1e-4,1e-1)", "hidden=8,16", "layers.0=randint(2,6)", "sweep.samples=3"]
    )
    for number in range(3):
        values = space.draw(0, number)
        job = made.job(values)
        again = compose([*given, *(f"{key}={value!r}" for key, value in values.items())])
        assert (job.hash, job.user) == (again.hash, again.user)
        assert job.settings == again.settings
        assert {key: job.params[key] for key in values if "layers" not in key}.items() <= values.items()
    assert made.base.user["hidden"] == 8, "where nothing is configured the base has the first of a list"
    assert made.base.settings.sweep.space["optim.lr"] == "loguniform(0.0001, 0.1)"


def test_jobs_do_not_share_what_could_change() -> None:
    made, _ = template([TYPED, "hidden=8,16"])
    one = made.job({"hidden": 8})
    one.settings.run.tags["a"] = "b"
    one.user["layers"].append(9)
    other = made.job({"hidden": 16})
    assert (other.settings.run.tags, other.user["layers"], other.user["hidden"]) == ({}, [4, 4], 16)
    assert made.job({}).user["hidden"] == 8


def test_files_say_what_is_searched_and_the_command_line_has_the_last_word(project: Path) -> None:
    made, space = template(["experiment=own", "optim.lr=uniform(0.1, 0.2)"], config_dir=project / "conf")
    assert [each.text for each in space.dimensions] == ["uniform(0.1, 0.2)", "choice(16, 32)"]
    job = made.job({"optim.lr": 0.15, "batch": 16})
    assert job.user["optim"] == {"lr": 0.15, "half": 0.15}
    assert job.user["total"] == 16, "what refers to a searched key follows it"
    assert job.settings.sweep.space == {}
    with pytest.raises(UserError) as caught:
        template(["experiment=own", "sweep.constraints=['total <= 16']"], config_dir=project / "conf")
    assert "follows a searched key" in str(caught.value)


def test_a_searched_group_composes_anew(project: Path) -> None:
    made, space = template([FREE, "+model=small,large"], config_dir=project / "conf")
    jobs = [made.job(values) for values in space.grid()]
    assert [job.user["model"] for job in jobs] == [{"width": 8}, {"width": 64, "depth": 3}]
    again = compose([FREE, "+model=large"], config_dir=project / "conf")
    assert jobs[1].hash == again.hash
    with pytest.raises(ConfigError) as caught:
        template([FREE, "+model=small,larg"], config_dir=project / "conf")
    assert "model=large" in str(caught.value)


def test_a_sweep_that_goes_on_has_its_section_and_a_run_from_it_has_not() -> None:
    made, space = template([FREE, "lr=uniform(0,1)", "sweep.samples=7", "sweep.constraints=['lr < 0.9']"])
    stored = made.base.resolved
    again, same_space = template([], base=stored, keeps_sweep=True)
    assert same_space.to_json() == space.to_json()
    assert again.base.settings.sweep == made.base.settings.sweep
    assert again.job({"lr": 0.25}).hash == made.job({"lr": 0.25}).hash
    other, narrower = template(["lr=uniform(0,0.5)"], base=stored)
    assert other.base.settings.sweep.samples == 0
    assert narrower.constraints == ()
    assert compose([], base=stored).settings.sweep.space == {}


def test_conditions_and_constraints_read_what_is_configured() -> None:
    _, space = template(
        [
            TYPED,
            "hidden=8,16",
            "optim.warm=when(hidden == 16, uniform(0,1))",
            "sweep.constraints=['hidden <= epochs * 8']",
        ]
    )
    assert space.configured == {"epochs": 3}
    assert set(space.drawn(0, 0, {"hidden": 8})[0]) == {"hidden"}


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        ([TYPED, "hidden=1,2", "optim.lrr=uniform(0,1)"], "optim.lrr", "optim.lr"),
        ([TYPED, "hidden=uniform(0.5,1)"], "hidden", "must be a whole number"),
        ([TYPED, "hidden=1,b"], "hidden", "must be a whole number"),
        ([TYPED, "hidden=1,2", "checkpoints.keep_last=choice(1,-1)"], "checkpoints.keep_last", "must be at least 0"),
        ([TYPED, "hidden=1,2", "checkpoints.keep_lst=1,2"], "checkpoints.keep_lst", "checkpoints.keep_last"),
        ([TYPED, "hidden=loguniforn(1,2)"], "hidden", "loguniform"),
        ([TYPED, "hidden=uniform(2,1)"], "hidden", "is empty"),
        ([TYPED, "hidden=2"], "sweep.space", "nothing is searched"),
        ([FREE, "run.seed=1,2"], "run.seed", "one for all trials"),
        ([FREE, "resources.workers=1,2"], "resources.workers", "sweep.lanes=off"),
        ([FREE, "resources=single,laptop"], "resources", "sweep.lanes=off"),
        (["train=a,b"], "train", "cannot be searched"),
        ([FREE, "a=1,2", "b=when(a == 1, uniform(0,1))"], "b", "has no value otherwise"),
        ([FREE, "a=1,2", "sweep.constraints=['aa < 2']"], "sweep.constraints", "a"),
        ([FREE, "sweep.space.a=3"], "a", "is one value"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(overrides: list[str], key: str, said: str) -> None:
    error = refused(*overrides)
    assert isinstance(error, ConfigError)
    assert error.key == key
    assert said in str(error)


def test_a_condition_may_have_a_value_besides() -> None:
    made, _ = template([FREE, "a=1,2", "b=0.5", "b=when(a == 1, uniform(0,1))"])
    assert made.job({"a": 2}).user["b"] == 0.5


def test_resources_can_be_searched_where_every_trial_has_new_workers() -> None:
    made, space = template([FREE, "resources.workers=1,2", "sweep.lanes=off"])
    assert [made.job(values).settings.resources.workers for values in space.grid()] == [1, 2]


@pytest.mark.parametrize("override", ["lr=0.1,0.2", "lr=loguniform(1,2)", "lr=choice(1,2)"])
def test_a_run_refuses_a_search_and_names_the_verb_for_it(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([FREE, override])
    assert "orc sweep" in str(caught.value)
