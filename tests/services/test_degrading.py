"""A service that is away costs a run nothing but that: absent at the start, lost in the middle, coming and going.

One run goes through all of it, with gates before PostgreSQL, Redis, MLflow and the storage; the tests look at what it
said and at what became of its points.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from cluster.postgres import EmbeddedPostgres
from orchestrator.records import RunStatus
from orchestrator.store.views import EventRow, RunDetail
from orchestrator.tracking.circuits import directory_of, told
from orchestrator.tracking.local.places import places
from tests.plugins.gate import Gate
from tests.plugins.local_stack import LocalStack
from tests.plugins.mlflow_server import MlflowServer
from tests.plugins.own_redis import own_redis
from tests.plugins.runs import PROJECT, wait_until
from tests.plugins.s3_server import S3Server

ORC = ("-m", "orchestrator.cli.main")
SERVICES = ("postgres", "redis", "mlflow", "storage")
START, MIDDLE, FLAPPING = "absent at the start", "lost in the middle", "coming and going"
UNFIT = ("postgres", START)
"""A run is numbered there: without it none begins."""
FLAPS = 10
SOCKET = ".s.PGSQL.5432"

pytestmark = pytest.mark.timeout(900)  # for a busy machine; a minute is enough


@dataclass
class Phase:
    """What was seen between two moments (seconds since 1970)."""

    began: float
    ended: float = 0.0
    steps: int = 0
    """That training made meanwhile, while everything was away."""
    faults: dict[str, int] = field(default_factory=dict)
    """Connections that came to nothing, by service."""
    status: str = ""
    """`orc status`, while everything was away."""


@dataclass(frozen=True)
class Lived:
    """The run, when all was over."""

    local: LocalStack
    run: RunDetail
    phases: dict[str, Phase]
    events: list[EventRow]
    tracker_log: str
    rank_log: str
    steps: int
    said: str

    def of(self, service: str, phase: str) -> list[str]:
        """Kinds of the events about a service in a phase."""
        within = self.phases[phase]
        return [
            event.kind
            for event in self.events
            if event.kind in ("degraded", "recovered") and event.details["service"] == service
            and within.began <= event.at < within.ended
        ]  # fmt: skip


class World:
    """A stack whose services are behind gates, and a run on it."""

    def __init__(self, local: LocalStack, gates: dict[str, Gate], journal: Path) -> None:
        self.local, self.gates, self._journal = local, gates, journal
        self.phases: dict[str, Phase] = {}
        self.driver: subprocess.Popen[str] | None = None

    def wait(self, what: Callable[[], object], timeout: float, why: str) -> None:
        """As `wait_until`, while the run goes on."""

        def looked() -> bool:
            assert self.driver is None or self.driver.poll() is None, f"the run has ended before {why}"
            return bool(what())

        wait_until(looked, timeout, why)

    def steps(self) -> int:
        path = self._journal / "rank-0"
        return int(path.read_text()) if path.exists() else 0

    def away(self) -> set[str]:
        """As the tracker's process says in its file, which needs no service."""
        return {state.name for state in told(directory_of(self.local.home)) if state.is_away}

    def unsaved(self) -> int:
        """Outages of the storage that the rank has noticed."""
        (run,) = self.local.store.runs(limit=1)
        log = local_logs(run.run) / "rank-0.log"
        return log.read_text().count("checkpoints cannot be saved") if log.exists() else 0

    def begin(self, name: str) -> Phase:
        self._faults = {service: gate.faults for service, gate in self.gates.items()}
        phase = self.phases[name] = Phase(began=time.time())
        return phase

    def end(self, phase: Phase) -> None:
        """All is open again. Waits until everybody has seen it."""
        phase.faults = {name: gate.faults - self._faults[name] for name, gate in self.gates.items()}
        self.wait(lambda: not self.away(), 120, f"all is well again, and not {self.away()}")
        self.wait(lambda: not self._untold(phase), 60, "the run was told so")
        phase.ended = time.time()

    def _untold(self, phase: Phase) -> bool:
        """Something degraded since the phase began has no end yet, in the database."""
        told = [each for each in events(self.local) if each.at >= phase.began]
        kinds = {kind: sum(each.kind == kind for each in told) for kind in ("degraded", "recovered")}
        return not kinds["recovered"] or kinds["degraded"] != kinds["recovered"]

    def shut(self, *services: str) -> None:
        for name in services:
            self.gates[name].shut()

    def open(self) -> None:
        for gate in self.gates.values():
            gate.open()


def events(local: LocalStack) -> list[EventRow]:
    (run,) = local.store.runs(limit=1)
    return local.store.events(run.run)


def local_logs(run: str) -> Path:
    """Where the logs of a run are whose storage is elsewhere."""
    return Path(tempfile.gettempdir()) / f"orc-{os.getuid()}" / run / "logs" / "attempt-1"


def live_through(world: World) -> None:
    """The three phases, one after the other."""
    phase = world.phases[START]
    absent = {"redis", "mlflow"}
    world.wait(lambda: world.steps() > 20 and {*absent, "directory"} <= world.away(), 400, "training, with three away")
    before = world.steps()
    world.wait(lambda: world.steps() > before + 50 and world.unsaved(), 60, "training goes on")
    phase.steps = world.steps() - before
    world.open()
    world.end(phase)

    phase, unsaved = world.begin(MIDDLE), world.unsaved()
    before = world.steps()
    world.shut(*absent, "storage")
    world.wait(lambda: absent <= world.away(), 120, "they are missed")
    world.shut("postgres")  # last: without it nobody knows what to copy
    world.wait(lambda: {*absent, "postgres"} <= world.away(), 120, "it is missed, too")
    phase.status, _ = world.local.run(*ORC, "status", cwd=PROJECT, code=1)
    world.wait(lambda: world.steps() > before + 50 and world.unsaved() > unsaved, 60, "training goes on")
    phase.steps = world.steps() - before
    world.open()
    world.end(phase)

    phase = world.begin(FLAPPING)
    before = world.steps()
    for _ in range(FLAPS):
        refused = world.gates["postgres"].refused
        world.shut(*SERVICES)
        world.wait(lambda refused=refused: world.gates["postgres"].refused > refused, 60, "it is missed")
        world.open()
        time.sleep(0.3)  # not a wait for something: this is the fault
    phase.steps = world.steps() - before
    world.end(phase)


@pytest.fixture(scope="module")
def lived(
    postgres: EmbeddedPostgres, schema_url: str, mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lived]:
    sockets = Path(tempfile.mkdtemp(prefix="orct-"))
    journal = tmp_path_factory.mktemp("journal")
    files = S3Server()
    bucket = files.bucket("degrading")
    local = LocalStack.make(schema_url)
    with (
        own_redis() as redis,
        Gate(str(postgres.socket_directory / SOCKET), str(sockets / SOCKET)) as database,
        Gate(str(redis.home / "redis" / "s" / "socket"), str(sockets / "redis"), is_open=False) as cache,
        Gate(("127.0.0.1", mlflow_server.port), is_open=False) as mirror,
        Gate(("127.0.0.1", files.port), is_open=False) as disk,
    ):
        options = files.options.replace(str(files.port), str(disk.port))
        url = schema_url.replace(str(postgres.socket_directory), str(sockets))
        assert url != schema_url
        replace(
            local.stack, database_url=url, mlflow_uri=f"http://127.0.0.1:{mirror.port}",
            redis_url=redis.url.replace(str(redis.home / "redis" / "s" / "socket"), str(sockets / "redis")),
            storage_url=f"s3://key:secret@{bucket}/runs?{options}&connect_timeout=1&request_timeout=1&attempts=1",
        ).save()  # fmt: skip
        world = World(local, {"postgres": database, "redis": cache, "mlflow": mirror, "storage": disk}, journal)
        world.begin(START)
        words = ("run", "--local", "train=trains:patient", "resources.workers=1", f"journal={journal}")
        words = (*words, "checkpoints.every_minutes=0.02", "run.name=patient")
        driver = world.driver = local.start(*ORC, *words, cwd=PROJECT)
        try:
            live_through(world)
            (journal / "end").touch()
            out, err = driver.communicate(timeout=120)
            assert driver.returncode == 0, f"{out}\n{err}"
        except BaseException:
            driver.kill()
            print(*driver.communicate(), places(local.stack).output.read_text(), sep="\n")
            local.remove()
            raise
        (run,) = local.store.runs(limit=1)
        logs = local_logs(run.run)
        yield Lived(
            local=local, run=local.store.run(run.run), phases=world.phases, events=events(local),
            tracker_log=places(local.stack).output.read_text(), rank_log=(logs / "rank-0.log").read_text(),
            steps=world.steps(), said=out + err,
        )  # fmt: skip
        local.remove()
    files.close()
    shutil.rmtree(sockets)


@pytest.mark.parametrize(
    ("service", "phase"),
    [(service, phase) for phase in (START, MIDDLE, FLAPPING) for service in SERVICES if (service, phase) != UNFIT],
)
def test_a_service_that_is_away_is_told_once_and_training_goes_on(lived: Lived, service: str, phase: str) -> None:
    seen = lived.phases[phase]
    assert seen.faults[service] > 0, "it was missed"
    assert seen.steps > 50
    told = lived.of(service, phase)
    if phase == FLAPPING and service in ("mlflow", "storage"):  # which are not used often enough to be missed each time
        assert told in ([], *(["degraded", "recovered"] * outages for outages in (1, 2, 3)))
    else:
        assert told == ["degraded", "recovered"]


def test_each_outage_is_one_warning(lived: Lived) -> None:
    outages = {
        name: sum(e.kind == "degraded" and e.details["service"] == name for e in lived.events) for name in SERVICES
    }
    lines = {
        "postgres": "PostgreSQL does not answer", "redis": "Redis does not take live values",
        "mlflow": "mirror mlflow is behind",
    }  # fmt: skip
    others = ("waits for its source", "wait for the database", "not merged for now")
    logs = [line for line in lived.tracker_log.splitlines() if " WARNING " in line]
    for name, words in lines.items():
        found = [line for line in logs if words in line]
        more = [line for line in logs if any(each in line for each in others)] if name == "postgres" else []
        assert len(found) + len(more) == outages[name], "\n".join(logs)
    assert lived.rank_log.count("checkpoints cannot be saved") == outages["storage"]


def test_the_status_says_what_is_away_since_when(lived: Lived) -> None:
    told = {line.split()[0]: line for line in lived.phases[MIDDLE].status.splitlines() if line.strip()}
    assert "open" in told["postgres"] or "half-open" in told["postgres"]
    assert "(local-tracker)" in told["postgres"]
    assert "(local-tracker)" in told["redis"]
    document = json.loads(lived.local.run(*ORC, "status", "--json", cwd=PROJECT)[0])
    assert {(each["name"], each["state"]) for each in document["circuits"]} >= {
        ("redis", "closed"),
        ("mlflow", "closed"),
    }


def test_nothing_is_missing_afterwards(lived: Lived) -> None:
    assert lived.run.status is RunStatus.finished
    assert lived.local.points(lived.run.run, "count") == list(range(lived.steps))
    out, _ = lived.local.run(*ORC, "fsck", lived.run.run, cwd=PROJECT)
    assert "fits together" in out
