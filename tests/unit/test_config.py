"""Composing, checking and naming what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import (
    ABSENT,
    Change,
    Direction,
    Enabled,
    Job,
    Placement,
    compose,
    diff,
    dump,
    render,
)
from orchestrator.config.composition import CONF
from orchestrator.errors import ConfigError

FREE = "train=free_code:train"
TYPED = "train=typed_code:train"

FREE_CODE = """
def train(run, cfg): ...
def evaluate(run, cfg): ...
def lonely(run): ...
number = 3
"""
TYPED_CODE = """
from __future__ import annotations
from dataclasses import dataclass, field

@dataclass
class Optim:
    lr: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])

@dataclass(frozen=True)
class Config:
    epochs: int = 3
    optim: Optim = field(default_factory=Optim)
    labels: dict[str, int] = field(default_factory=dict)
    note: str | None = None

def train(run, cfg: Config): ...
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's working directory with two train functions."""
    (tmp_path / "free_code.py").write_text(FREE_CODE)
    (tmp_path / "typed_code.py").write_text(TYPED_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


def refused(*overrides: str, **arguments: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, **arguments)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


# --- composing ------------------------------------------------------------------------------------------------------


def test_train_function_and_two_keys_are_a_whole_configuration() -> None:
    job = compose([FREE, "epochs=3", "optim.lr=0.01"])
    assert job.train == "free_code:train"
    assert job.user == {"epochs": 3, "optim": {"lr": 0.01}}
    assert job.params == {"epochs": 3, "optim.lr": 0.01}
    assert job.settings.resources.workers == 2
    assert job.settings.resources.placement is Placement.pack


def test_values_win_over_groups_and_groups_over_defaults() -> None:
    assert compose([FREE, "resources=gpu"]).settings.resources.cpus_per_worker == 4
    job = compose([FREE, "resources.workers=5", "resources=gpu"])
    assert (job.settings.resources.workers, job.settings.resources.gpus_per_worker) == (5, 1)


def test_every_shipped_choice_composes_and_changes_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORC_DATABASE_URL", "postgresql://u@h/d")
    monkeypatch.setenv("ORC_S3_BUCKET", "bucket")
    monkeypatch.setenv("ORC_STORAGE_URL", "s3://bucket/runs")
    monkeypatch.setenv("ORC_RAY_ADDRESS", "head:6379")
    plain = compose([FREE]).resolved
    same = {"resources=laptop", "storage=local", "tracking=default", "checkpoints=default", "database=embedded"}
    for file in sorted(CONF.glob("*/*.yaml")):
        group, line = file.parent.name, f"{file.parent.name}={file.stem}"
        if group == "experiment":
            continue
        job = compose([FREE, line])
        assert group == "preset" or line in job.sources
        if group in ("resources", "tracking", "checkpoints", "preset") and line not in same:
            assert [change for change in diff(plain, job.resolved) if not change.key.startswith("preset")], line


def test_presets_combine_and_the_later_wins() -> None:
    job = compose([FREE, "preset=[production,preemptible]"])
    assert job.settings.preset == {"production": True, "preemptible": True}
    assert job.settings.failures.max_restarts == -1
    assert job.settings.mlflow.enabled is Enabled.true
    assert compose([FREE, "preset=debug"]).settings.resources.workers == 1


def test_digits_experiment_says_what_its_dataclass_says() -> None:
    from orchestrator.examples.digits import DigitsConfig

    job = compose(["experiment=digits", "epochs=2"])
    assert job.user == dump(DigitsConfig(epochs=2))
    assert job.settings.run.experiment == "digits"
    assert job.settings.checkpoints.best_direction is Direction.max
    assert "Did you mean epochs?" in refused("experiment=digits", "epoch=2").hint


@pytest.mark.parametrize(
    ("given", "expected"),
    [("auto", Enabled.auto), ("true", Enabled.true), ("false", Enabled.false), ("True", Enabled.true)],
)
def test_integrations_take_auto_true_false(given: str, expected: Enabled) -> None:
    assert compose([FREE, f"mlflow.enabled={given}"]).settings.mlflow.enabled is expected


def test_a_span_of_workers_is_another_way_to_write_an_elastic_run() -> None:
    plain = compose([FREE, "resources.workers=4"])
    for words in (["resources.workers={min: 1, max: 4}"], ["resources={workers: {min: 1, max: 4}}"]):
        job = compose([FREE, *words])
        assert (job.settings.resources.workers, job.settings.resources.min_workers) == (4, 1)
        assert (job.resolved["resources"]["workers"], job.hash) == (4, plain.hash), "the same work"
    again = compose([], base=job.resolved)
    assert (again.settings.resources.min_workers, again.hash) == (1, plain.hash)
    assert compose([FREE, "elastic.batch=global"]).hash != compose([FREE]).hash
    assert "min: 1, max: 4" in refused(FREE, "resources.workers={min: 1}").hint
    assert refused(FREE, "resources.workers={min: 5, max: 4}").key == "resources.min_workers"


def test_tags_take_any_name() -> None:
    job = compose([FREE, "run.tags.team=vision", "run.tags={year: 2030}", "+run.tags.x=y"])
    assert job.settings.run.tags == {"team": "vision", "year": "2030", "x": "y"}


def test_environment_variables_are_read_as_the_type_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_WORKERS", "3")
    assert compose([FREE, "resources.workers=${oc.env:N_WORKERS}"]).settings.resources.workers == 3


def test_numbers_json_cannot_hold_are_stored_and_come_back() -> None:
    job = compose([FREE, "clip=inf", "x=nan"])
    assert job.user["clip"] == float("inf")
    assert (job.resolved["clip"], job.resolved["x"]) == (".inf", ".nan")
    assert compose([], base=job.resolved).user["clip"] == float("inf")


def test_a_command_that_starts_no_run_needs_no_train_function() -> None:
    job = compose(["mlflow.port=5001"], needs_train=False)
    assert (job.train, job.settings.mlflow.port) == ("", 5001)


def test_rendered_text_is_what_is_stored() -> None:
    import json

    import yaml

    job = compose([FREE, "optim.lr=0.01", "run.name=ü"])
    assert json.loads(render(job, "json")) == job.resolved
    assert yaml.safe_load(render(job, "yaml")) == job.resolved
    with pytest.raises(ConfigError, match="yaml, json"):
        render(job, "toml")


def test_nothing_of_hydra_stays_behind(project: Path) -> None:
    from hydra.core.global_hydra import GlobalHydra

    compose([FREE])
    refused(FREE, "resources=nope")
    assert not GlobalHydra.instance().is_initialized()
    assert {path.name for path in project.iterdir()} <= {"free_code.py", "typed_code.py", "__pycache__"}


def test_importing_config_is_light() -> None:
    code = (
        "import sys, orchestrator.config, orchestrator.config.section as s\n"
        "s.user_config({'a': 1}, None)\n"
        "print(*[m for m in ('hydra', 'omegaconf', 'torch', 'ray', 'mlflow', 'sqlalchemy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("resources.wrokers=3", "resources.wrokers", "resources.workers"),
        ("+resources.wrokers=3", "resources.wrokers", "resources.workers"),
        ("resource.workers=3", "resource.workers", "resources.workers"),
        ("workers=3", "workers", "resources.workers"),
        ("checkpoint.every_step=3", "checkpoint.every_step", "checkpoints.every_steps"),
        ("resources={wrokers: 1}", "resources.wrokers", "resources.workers"),
        ("run.name.x=1", "run.name.x", "run.name"),
        ("resources=lapto", "resources", "resources=laptop"),
        ("preset=prod", "preset", "preset=production"),
        ("experiment=digit", "experiment", "experiment=digits"),
        ("resources=3", "resources", "laptop"),
        ("run=3", "run", "run.name"),
    ],
)
def test_wrong_key_is_refused_with_the_nearest_right_one(override: str, key: str, near: str) -> None:
    error = refused(FREE, override)
    assert error.key == key
    assert near in error.hint


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("resources.workers=many", "resources.workers = 'many': must be a whole number, not text."),
        ("resources.workers=2.5", "resources.workers = 2.5: must be a whole number."),
        ("resources.workers=null", "resources.workers: must be a whole number, not null (no value)."),
        ("resources.workers=true", "must be a whole number, not true/false"),
        ("resources.workers=0", "must be at least 1. The nearest is resources.workers=1."),
        ("resources.cpus_per_worker=0", "must be greater than 0"),
        ("resources.cpus_per_worker=nan", "must be a number"),
        ("resources.gpus_per_worker=1.5", "The nearest is resources.gpus_per_worker=2."),
        ("resources.placement=packed", "must be one of pack, spread, strict_pack, strict_spread. The nearest is"),
        ("mlflow.enabled=maybe", "must be one of auto, true, false"),
        ("mlflow.port=70000", "must be at most 65535"),
        ("run.tags=[a]", "must be a mapping"),
        ("run.name=[a]", "must be text, not a list"),
        ("tracking.lease=3", "must be at least three heartbeats"),
        ("storage.url=s4://bucket", "Did you mean s3://?"),
        ("storage.url=s3://", "Write s3://bucket/path."),
        ("storage.url=abfss:///runs", "Write abfss://container/path."),
        ("storage.url=s3:/bucket/runs", "Write s3://bucket/runs."),
        ("storage.url=file:/data/runs", "Write file:///data/runs."),
    ],
)
def test_wrong_value_is_refused_in_words(override: str, sentence: str) -> None:
    error = refused(FREE, override)
    assert sentence in str(error)
    assert error.key == override.partition("=")[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs", "Write KEY=VALUE"),
        ("a={b", "a = '{b': the override cannot be read"),
        ("lr=0.1,0.2", "is a list of alternatives; a run takes one value"),
        ("lr=loguniform(1,2)", "there is no function loguniform here"),
        ("hydra.run.dir=x", "have no effect here"),
        ("~run.name", "cannot be deleted"),
        ("lr=???", "has no value yet"),
        ("lr=${oc.env:NOT_SET_AT_ALL}", "the environment variable NOT_SET_AT_ALL is not set"),
        ("database=external", "the environment variable ORC_DATABASE_URL is not set"),
        ("lr=${optim.base}", "refers to optim.base, which does not exist"),
        ("+model=resnet.x.y=3", "cannot be read"),
    ],
)
def test_unreadable_override_is_named(override: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORC_DATABASE_URL", raising=False)
    assert said in str(refused(FREE, override))


def test_unwritable_storage_is_refused(project: Path) -> None:
    assert "is a file" in str(refused(FREE, f"storage.url={project}/free_code.py/runs"))
    assert "/proc" in str(refused(FREE, "storage.url=/proc/nowhere/runs"))
    if os.getuid() != 0:
        closed = project / "closed"
        closed.mkdir(mode=0o500)
        assert "permission denied" in str(refused(FREE, f"storage.url={closed}/runs"))
    assert not (project / "runs").exists()


def test_local_storage_means_the_same_from_everywhere(project: Path) -> None:
    assert compose([FREE, "storage.url=runs"]).settings.storage.url == str(project / "runs")
    assert compose([FREE, f"storage.url=file://{project}/r"]).settings.storage.url == f"{project}/r"
    assert compose([FREE, "storage.url=s3://b/runs"]).settings.storage.url == "s3://b/runs"


# --- the user's keys ------------------------------------------------------------------------------------------------


def test_undeclared_keys_are_taken_unless_they_look_like_a_slip() -> None:
    assert compose([FREE, "momentum=0.9", "model.beta1=1", "model.beta2=2"]).user["model"] == {"beta1": 1, "beta2": 2}
    error = refused(FREE, "seed=3")
    assert "Did you mean run.seed? To add it all the same: +seed=3" in str(error)
    assert compose([FREE, "+seed=3"]).user == {"seed": 3}


def test_keys_beside_a_declaration_need_a_plus(project: Path) -> None:
    (project / "mine/experiment").mkdir(parents=True)
    file = project / "mine/experiment/mine.yaml"
    file.write_text(f"# @package _global_\ntrain: {FREE.split('=')[1]}\nepochs: 5\noptim: {{lr: 0.1}}\n")
    directory = project / "mine"
    assert compose(["experiment=mine", "optim.lr=1"], config_dir=directory).user == {"epochs": 5, "optim": {"lr": 1}}
    assert "Did you mean optim.lr?" in refused("experiment=mine", "optm.lr=1", config_dir=directory).hint
    assert "+dropout=0.5" in refused("experiment=mine", "dropout=0.5", config_dir=directory).hint
    assert compose(["experiment=mine", "+dropout=0.5"], config_dir=directory).user["dropout"] == 0.5
    assert "optim" not in compose(["experiment=mine", "~optim"], config_dir=directory).user


def test_annotation_of_the_train_function_is_the_schema() -> None:
    job = compose([TYPED, "optim.lr=1", "labels.cat=3", "optim.betas.0=0.5"], user_schema=None)
    assert job.user == {"epochs": 3, "optim": {"lr": 1.0, "betas": [0.5, 0.99]}, "labels": {"cat": 3}, "note": None}
    assert isinstance(job.user["optim"]["lr"], float)
    assert str(refused(TYPED, "epochs=ten")) == "epochs = 'ten': must be a whole number, not text."
    assert str(refused(TYPED, "epoch=3")) == "epoch = 3: there is no such key. Did you mean epochs?"
    assert refused(TYPED, "+dropout=3").key == "dropout"
    assert "must be a whole number" in str(refused(TYPED, "labels.cat=x"))
    assert "resources.workers" in refused(TYPED, "resource.workers=3").hint


def test_own_files_come_before_ours(project: Path) -> None:
    for name, text in {
        "experiment/digits": f"# @package _global_\ntrain: {FREE.split('=')[1]}\nmine: true\n",
        "model/small": "hidden: 8\n",
        "experiment/flat": "epochs: 3\n",
        "experiment/deep": "# @package _global_\ndefaults:\n  - /model: small\n  - override /resources: gpu\n"
        f"  - _self_\ntrain: {FREE.split('=')[1]}\n",
        "experiment/lost": "# @package _global_\ndefaults:\n  - override /resources: gpuu\n  - _self_\n",
        "experiment/torn": "a: [1\n",
    }.items():
        file = project / f"own/{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    own = project / "own"
    assert compose(["experiment=digits"], config_dir=own).user == {"mine": True}
    assert compose([FREE, "+model=small"], config_dir=own).user == {"model": {"hidden": 8}}
    assert "+model=small" in refused(FREE, "model=small", config_dir=own).hint
    deep = compose(["experiment=deep"], config_dir=own)
    assert (deep.settings.resources.gpus_per_worker, deep.user) == (1, {"model": {"hidden": 8}})
    assert "# @package _global_" in refused(FREE, "experiment=flat", config_dir=own).hint
    assert "It is asked for by experiment=lost." in refused("experiment=lost", config_dir=own).hint
    assert "torn.yaml, line 2: is no yaml" in str(refused("experiment=torn", config_dir=own))
    assert refused(FREE, config_dir=project / "onw").hint == "Did you mean own?"


def test_structured_configs_of_the_user_keep_their_types(project: Path) -> None:
    from dataclasses import dataclass

    from hydra.core.config_store import ConfigStore

    @dataclass
    class Net:
        hidden: int = 8

    ConfigStore.instance().store(group="net", name="plain", node=Net)
    assert compose([FREE, "+net=plain", "net.hidden=9"]).user == {"net": {"hidden": 9}}
    error = refused(FREE, "+net=plain", "net.hidden=many")
    assert (error.key, error.value) == ("net.hidden", "many")
    assert "\n" not in str(error)


# --- the train function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("", "no train function is named"),
        ("free_code", "Write module:function"),
        ("free_code.train", "Did you mean train=free_code:train?"),
        ("free_code.py:train", "Did you mean train=free_code:train?"),
        ("fre_code:train", "there is no module fre_code here. Did you mean free_code:train?"),
        ("free_code:trian", "free_code has no function trian. Did you mean free_code:train?"),
        ("free_code:lonely", "is called as train(run, cfg), but is defined as lonely(run)"),
        ("free_code:number", "is an int, not a function"),
        ("typed_code:Config", "is a type, not a function"),
        ("broken:train", "importing broken failed with SyntaxError"),
        ("needy:train", "Install what provides not_installed_anywhere."),
        ("leaving:train", "importing leaving failed with SystemExit: 3"),
        ("guessing:train", "'Missing' of its parameter cfg cannot be resolved"),
        ("modern:train", "annotated with Model, which is no dataclass"),
    ],
)
def test_bad_train_function_is_refused(train: str, said: str, project: Path) -> None:
    (project / "broken.py").write_text("def train(run, cfg:\n")
    (project / "needy.py").write_text("import not_installed_anywhere\ndef train(run, cfg): ...\n")
    (project / "leaving.py").write_text("raise SystemExit(3)\n")
    (project / "guessing.py").write_text("def train(run, cfg: 'Missing'): ...\n")
    (project / "modern.py").write_text("class Model: ...\ndef train(run, cfg: Model): ...\n")
    error = refused(f"train='{train}'") if train else refused()
    assert error.key == "train"
    assert said in str(error)


# --- a stored configuration as base ---------------------------------------------------------------------------------


def stored(*overrides: str) -> dict[str, Any]:
    import json

    return json.loads(json.dumps(compose([FREE, *overrides]).resolved))


def test_stored_configuration_is_the_same_work_again() -> None:
    base = stored("optim.lr=0.1", "resources.workers=4", "run.name=first", "preset=production", "text='a\\${b'")
    job = compose([], base=base)
    assert job.hash == compose([], base=job.resolved).hash
    assert job.settings.resources.workers == 4
    assert job.settings.run.name == ""
    assert job.settings.failures.max_restarts == 3
    changed = diff(base, compose(["optim.lr=0.2", "epochs=3"], base=base).resolved)
    assert [change for change in changed if change.key != "run.name"] == [
        Change(key="epochs", old=ABSENT, new=3),
        Change(key="optim.lr", old=0.1, new=0.2),
    ]


def test_a_section_within_a_section_is_taken_over_and_limits_are_no_work() -> None:
    limited = compose([FREE, "resources.limits.hours=2", "failures.hang.least=7"])
    again = compose([], base=limited.resolved)
    assert (again.settings.resources.limits.hours, again.settings.failures.hang.least) == (2.0, 7.0)
    assert again.hash == limited.hash == compose([FREE]).hash


def test_group_on_the_command_line_replaces_that_group_of_the_base() -> None:
    base = stored("resources.workers=4", "resources.cpus_per_worker=3")
    resources = compose(["resources=laptop"], base=base).settings.resources
    assert (resources.workers, resources.cpus_per_worker) == (2, 1)
    assert compose(["preset=debug"], base=base).settings.resources.workers == 1


def test_base_keeps_to_its_own_surroundings(project: Path) -> None:
    base = stored(f"storage.url={project}/old", "mlflow.port=7000", "database.url=postgresql://u:pw@old/d")
    job = compose([], base=base)
    assert (job.settings.storage.url, job.settings.mlflow.port, job.settings.database.url) == ("", 0, "")


def test_base_of_another_version_is_read() -> None:
    base = stored() | {"experiment": "x"}
    base["tracking"]["gone"] = 1
    assert compose([], base=base).settings.tracking.lease == 15


# --- inside a user's own Hydra script -------------------------------------------------------------------------------

SCRIPT = """
import json
import hydra
from hydra.core.hydra_config import HydraConfig
from orchestrator.config import compose, from_hydra
from orchestrator.errors import ConfigError

@hydra.main(version_base="1.3", config_path="my_conf", config_name="config")
def main(cfg):
    name = HydraConfig.get().job.name
    try:
        job = from_hydra(cfg)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))
        return
    inner = compose(["train=free_code:train", "epochs=1"])  # ours inside theirs
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.utils import JobRuntime
    print(json.dumps({
        "workers": job.settings.resources.workers, "user": job.user, "sources": job.sources, "hash": job.hash,
        "inner": inner.user, "alive": GlobalHydra.instance().is_initialized(),
        "name": [name, HydraConfig.get().job.name, JobRuntime.instance().get("name")],
    }))

main()
"""


def run_script(project: Path, *overrides: str) -> dict[str, Any]:
    import json

    (project / "my_conf").mkdir(exist_ok=True)
    (project / "my_conf/config.yaml").write_text(
        "defaults: [orc, _self_]\n"
        'hydra: {searchpath: ["pkg://orchestrator.conf"], run: {dir: .}, output_subdir: null}\n'
        "train: free_code:train\noptim: {lr: 0.1}\n"
    )
    (project / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py", *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_own_hydra_script_composes_ours(project: Path) -> None:
    said = run_script(project, "resources=single", "optim.lr=0.5", "tracking.lease=30")
    assert (said["workers"], said["user"]) == (1, {"optim": {"lr": 0.5}})
    assert said["inner"] == {"epochs": 1}
    assert said["alive"]
    assert said["name"] == ["script"] * 3
    assert "resources=single" in said["sources"]
    assert said["hash"] == compose([FREE, "resources=single", "optim.lr=0.5", "tracking.lease=30"]).hash


def test_own_hydra_script_gets_our_errors(project: Path) -> None:
    assert "must be a whole number" in run_script(project, "resources.workers=many")["error"]


def test_job_shows_nothing_but_its_name() -> None:
    job = compose([FREE, "password=hunter2"])
    assert isinstance(job, Job)
    assert repr(job) == f"Job(train='free_code:train', hash='{job.hash}')"
