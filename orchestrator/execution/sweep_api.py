"""`orchestrator.sweep(...)`: a sweep from Python, as `orc sweep` runs it; and the one function that both call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.catalog import open_catalog
from orchestrator.errors import UserError
from orchestrator.execution import driver
from orchestrator.execution.choice import choose_place
from orchestrator.execution.driver import Outcome, Progress
from orchestrator.execution.earlier import warm_start
from orchestrator.execution.place import Place
from orchestrator.execution.sweep_place import SweepPlace
from orchestrator.execution.sweep_plan import Outlook
from orchestrator.records import RunSpec, RunStatus
from orchestrator.stack import Stack, default_home
from orchestrator.sweep_records import TrialRow
from orchestrator.sweeps.space import Space
from orchestrator.sweeps.summary import SweepView, best_of
from orchestrator.sweeps.template import Template, template
from orchestrator.sweeps.warm import Warm

if TYPE_CHECKING:
    from orchestrator.store.views import RunDetail


def run_sweep(
    made: Template,
    space: Space,
    *,
    home: Path | None,
    progress: Progress | None = None,
    watch: Callable[[SweepView], None] | None = None,
    announce: Callable[[Outlook], None] | None = None,
    run: str = "",
    new_run: str = "",
    after_attempt: int = 0,
    open_place: Callable[[Stack], Place] | None = None,
) -> Outcome:
    """`driver.train` with a sweep as its work. Raises what that raises."""

    warm = Warm() if run else warm_start(made, space, home)

    def around(place: Place, stack: Stack, spec: RunSpec) -> Place:
        return SweepPlace(place, stack, spec, made, space, warm=warm, announce=announce, watch=watch)

    return driver.train(
        made.base,
        home=home,
        progress=progress,
        run=run,
        new_run=new_run,
        after_attempt=after_attempt,
        open_place=open_place,
        around=around,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """How a sweep ended, or stands. Asks the database again for what it shows of single runs."""

    id: str
    name: str
    status: RunStatus
    reason: str
    trials: Sequence[TrialRow]
    """All, by number."""
    objectives: Sequence[tuple[str, str]]
    """(metric, min or max)"""
    home: Path = field(repr=False, default_factory=default_home)

    @property
    def best(self) -> TrialRow | None:
        """The trial with the best score; None where none has one."""
        return next(iter(best_of(SweepView(sweep=self.id, objectives=self.objectives, trials=self.trials))), None)

    def run(self, trial: int) -> RunDetail:
        """The run of a trial (of its first seed): directory, status, metrics' place."""
        found = next((each for each in self.trials if each.number == trial), None)
        if found is None or not found.run:
            raise UserError(f"Sweep {self.name} has no run of trial {trial}; it has {len(self.trials)} trials.")
        with open_catalog(self.home) as catalog:
            return catalog.run(found.run)

    def dataframe(self) -> Any:
        """A pandas DataFrame, one row per trial: number, status, score, spread, n, resource, run and a column per
        searched key. ImportError without pandas, which nothing else here needs."""
        import pandas

        rows = [
            {
                "trial": trial.number,
                "status": trial.status,
                "score": trial.score,
                "spread": trial.spread,
                "n": trial.n,
                "resource": trial.resource,
                "run": trial.run,
                **trial.values,
            }
            for trial in self.trials
        ]
        return pandas.DataFrame(rows)


def sweep(
    train: str | Callable[..., Any] = "",
    space: Mapping[str, Any] | None = None,
    *,
    objective: str | Sequence[str] = (),
    samples: int = 0,
    scheduler: str = "fifo",
    seeds: int = 1,
    name: str = "",
    resume: str = "",
    home: str | Path | None = None,
    local: bool = False,
    **overrides: Any,
) -> SweepResult:
    """Runs a sweep to its end, and gives its trials. Works in a script, a notebook and a Ray job.

    `train` is "module:function", or a function that can be imported by its module and name. `space` maps keys to
    domains, as text of the grammar: {"optim.lr": "loguniform(1e-4, 1e-1)"}. `overrides` set keys; `__` stands for a
    dot: sweep__concurrency=2. With `resume` (a sweep's id or name) that sweep goes on and nothing else is read.
    Raises ConfigError, UserError, ServiceUnavailable.

    Example: orchestrator.sweep("my_project.digits:train", {"optim.lr": "loguniform(1e-4,1e-1)"}, samples=16).best
    """
    where = Path(home).expanduser().absolute() if home else default_home()
    run = ""
    if resume:
        with open_catalog(where) as catalog:
            run = catalog.sweep(resume).sweep
            base = catalog.run(run).config
        made, found = template((), base=base, keeps_sweep=True)
    else:
        words = words_of(train, space or {}, objective, samples, scheduler, seeds, name, overrides)
        made, found = template(words)
    place = choose_place(made.base.settings, where, local=local, warn=lambda line: None)
    outcome = run_sweep(made, found, home=where, run=run, open_place=place)
    return result(outcome.run, where)


def result(sweep: str, home: Path) -> SweepResult:
    """What is recorded of a sweep."""
    with open_catalog(home) as catalog:
        stored = catalog.sweep(sweep)
        trials = catalog.trials(stored.sweep)
    return SweepResult(
        id=stored.sweep,
        name=stored.name,
        status=stored.status,
        reason=stored.reason,
        trials=trials,
        objectives=[(metric, way) for metric, way in stored.facts.get("objectives", ())],
        home=home,
    )


def words_of(
    train: str | Callable[..., Any],
    space: Mapping[str, Any],
    objective: str | Sequence[str],
    samples: int,
    scheduler: str,
    seeds: int,
    name: str,
    overrides: Mapping[str, Any],
) -> list[str]:
    """The command line that says the same."""
    metrics = [objective] if isinstance(objective, str) else list(objective)
    keys: dict[str, Any] = {
        "train": train if isinstance(train, str) else importable(train),
        "sweep.samples": samples,
        "sweep.scheduler": scheduler,
        "sweep.seeds": seeds,
    }
    if metrics:
        keys["sweep.objective"] = metrics
    if name:
        keys["run.name"] = name
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    words = [f"{key}={_text(value)}" for key, value in keys.items() if value not in ("", None)]
    return words + [f"{key}={domain}" for key, domain in space.items()]


def _text(value: Any) -> str:
    """As an override has it: like JSON, but for the keys of a mapping, which Hydra takes without quotes only."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def importable(function: Callable[..., Any]) -> str:
    """`module:function`. Raises UserError for what a worker could not import."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or not name.isidentifier():
        why = "is not found by its module and name where trials run"
        raise UserError(f"{name or function!r} {why}. Put it into a module, and give 'module:{name or 'train'}'.")
    return f"{module}:{name}"
