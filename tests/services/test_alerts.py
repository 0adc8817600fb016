"""From a metric through a rule into the run's events, and to whoever shall be told: servers on the loopback that check
what they get."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.alert_records import Notice, NotSent
from orchestrator.alerts.plan import planned
from orchestrator.alerts.service import RESTARTED, AlertService
from orchestrator.backends import postgres as server_of
from orchestrator.backends.notifiers import send
from orchestrator.cli import main
from orchestrator.clock import ManualClock, SystemClock
from orchestrator.config import Settings, build
from orchestrator.records import FactKind, RunSpec, RunStatus, RunTicket, Stream
from orchestrator.stack import Stack
from orchestrator.store.store import Store
from orchestrator.store.views import EventRow
from orchestrator.tracking.service import TrackerService
from tests.plugins.producers import Producer, fact
from tests.plugins.receivers import HttpReceiver, SmtpReceiver

HIGH = {"high": {"metric": "train/loss", "when": "> 5", "clear": "< 4", "cooldown": 0}}
MINE = ("alert_fired", "alert_resolved", "notified", "notification_failed")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class World:
    """A tracker whose loops the test turns, in a database that others use, too."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url, self.clock = directory, url, ManualClock()
        self.store = Store(url)
        self.tracker = self._new_tracker()

    def _new_tracker(self) -> TrackerService:
        tracker = TrackerService(self.directory / "wal", self.url, clock=self.clock)
        # The network is real, so is the time in which it answers.
        tracker.alerts.outbox._patience = 1e9
        return tracker

    def restart(self) -> None:
        """As after a SIGKILL: nothing is written down before, only the log's lock is given away."""
        self.tracker._log.close()
        self.tracker = self._new_tracker()

    def open(self, alerts: dict[str, Any] | None = None, notify: list[Any] | None = None, **more: Any) -> RunTicket:
        settings = build(Settings, {"alerts": alerts or {}, "notify": notify or []})
        spec = RunSpec(
            experiment="digits", storage_url="/tmp/runs", alerts=planned(settings.alerts, settings.notify, {}), **more
        )
        return self.tracker.open_run(spec)

    def log(self, producer: Producer, *values: float) -> None:
        first = producer.sent[Stream.points]
        rows = [(0, first + number, value) for number, value in enumerate(values)]
        self.tracker.push([producer.points(rows).encode()])
        self.tracker.alerts.step()

    def end(self, ticket: RunTicket, status: RunStatus, **more: Any) -> None:
        batch = Producer(ticket, rank=-1).facts(fact(FactKind.status, status=status.value, **more))
        self.tracker.push([batch.encode()])
        self.tracker.alerts.step()

    def events(self, ticket: RunTicket) -> list[EventRow]:
        return [event for event in self.store.events(ticket.run) if event.kind in MINE]

    def told(self, ticket: RunTicket) -> list[tuple[str, str]]:
        return [(event.kind, event.message) for event in self.events(ticket)]

    def deliver(self, most: int = 400) -> None:
        """Until nothing is left to be sent; pauses between tries are turned over."""
        outbox, settled = self.tracker.alerts.outbox, threading.Event()
        outbox._changed = settled.set
        outbox.look()
        for _ in range(most):
            settled.clear()
            outbox.step()
            waiting = outbox.waiting(self.clock.now())
            if waiting is None and not outbox.is_busy:
                return
            if outbox.is_busy:
                settled.wait(0.5)
            else:
                self.clock.advance((waiting or 0.0) + 0.01)
        raise AssertionError(f"never settled: {self.store.notifications()}")


@pytest.fixture
def world(tmp_path: Path, schema_url: str) -> Iterator[World]:
    world = World(tmp_path, schema_url)
    yield world
    world.tracker.stop()
    world.store.close()


# -- from points to events ---------------------------------------------------------------------------------------------


def test_what_fires_and_what_is_over_are_events_of_the_run(world: World) -> None:
    ticket = world.open({"rules": HIGH})
    producer = Producer(ticket)
    world.log(producer, 1.0, 6.0)
    (alert,) = world.store.alerts([ticket.run])
    assert (alert.rule, alert.key, alert.rank, alert.step, alert.value) == ("high", "train/loss", 0, 1, 6.0)
    world.log(producer, 4.5, 6.0)
    world.log(producer, 3.0)
    assert world.store.alerts([ticket.run]) == ()
    fired, resolved = world.events(ticket)
    assert (fired.kind, fired.level, fired.step, fired.rank) == ("alert_fired", "warning", 1, 0)
    assert fired.message == "high: train/loss is 6 (> 5)"
    assert (resolved.kind, resolved.level, resolved.step) == ("alert_resolved", "info", 4)


def test_every_run_is_watched_for_the_resources_of_its_machine(world: World) -> None:
    ticket = world.tracker.open_run(RunSpec(experiment="digits", storage_url="/tmp/runs"))
    for step, percent in enumerate((50.0, 91.0, 92.0, 89.0, 84.0, 84.0)):
        batch = Producer(ticket).points([(0, step, percent)])
        batch = type(batch)(**{**{f: getattr(batch, f) for f in batch.__slots__}, "keys": ("system/memory_percent",)})
        world.tracker.push([batch.encode()])
        world.tracker.alerts.step()
    assert [event.details["rule"] for event in world.events(ticket)] == ["memory", "memory"]
    assert world.store.notifications(ticket.run, only_unsent=False) == (), (
        "the log and the events are told, nobody else"
    )


def test_alerts_can_be_switched_off(world: World) -> None:
    ticket = world.open({"enabled": False, "rules": HIGH})
    world.log(Producer(ticket), 6.0)
    assert world.events(ticket) == []


def test_the_end_of_a_run_ends_its_alerts(world: World) -> None:
    ticket = world.open({"rules": HIGH})
    world.log(Producer(ticket), 6.0)
    world.end(ticket, RunStatus.finished)
    assert [event.kind for event in world.events(ticket)] == ["alert_fired", "alert_resolved"]
    world.log(Producer(ticket), 6.0)
    assert len(world.events(ticket)) == 2, "what comes late is no alert"


def test_no_progress_is_noticed_without_any_point(world: World) -> None:
    ticket = world.open({"rules": {"stuck": {"metric": "train/loss", "when": "no progress for 10m"}}})
    world.tracker.alerts.step()
    world.clock.advance(601.0)
    world.tracker.alerts.step()
    assert [event.kind for event in world.events(ticket)] == ["alert_fired"]
    world.log(Producer(ticket, rank=0), 1.0)
    assert [event.kind for event in world.events(ticket)] == ["alert_fired", "alert_resolved"]


def test_a_restarted_attempt_that_never_logs_is_noticed(world: World) -> None:
    rules = {"rules": {"stuck": {"metric": "train/loss", "when": "no progress for 10m", "cooldown": 0}}}
    ticket = world.open(rules)
    world.log(Producer(ticket), 1.0)
    world.end(ticket, RunStatus.failed)
    assert world.tracker.commit_step()
    world.open(rules, run=ticket.run)
    world.clock.advance(601.0)
    world.tracker.alerts.step()
    assert [(event.kind, event.attempt) for event in world.events(ticket)] == [("alert_fired", 2)]


def test_events_are_watched_as_metrics_are(world: World) -> None:
    ticket = world.open({"rules": {"full": {"event": "spool_*", "level": "error"}}})
    producer = Producer(ticket)
    happened = fact(FactKind.event, kind="spool_full", message="1 GiB are used up", level="warning")
    world.tracker.push([producer.facts(fact(FactKind.event, kind="other", message=""), happened).encode()])
    world.tracker.alerts.step()
    (event,) = world.events(ticket)
    assert (event.level, event.message) == ("error", "full: spool_full: 1 GiB are used up")
    assert world.store.alerts([ticket.run]) == (), "nothing goes on"


def test_a_tracker_that_restarts_knows_what_fires_and_whom_to_tell(world: World) -> None:
    with HttpReceiver() as receiver:
        ticket = world.open({"rules": HIGH, "notify": [{"webhook": receiver.url()}]})
        producer = Producer(ticket)
        world.log(producer, 6.0)
        world.restart()
        world.log(producer, 6.0, 7.0)
        assert len(world.events(ticket)) == 1, "it fires already"
        world.log(producer, 1.0)
        world.log(producer, 9.0)
        world.deliver()
        kinds = [each.body["kind"] for each in receiver.received]
        assert kinds == ["fired", "resolved", "fired"]
        assert len({each.body["key"] for each in receiver.received}) == 3


def test_what_was_accepted_and_not_judged_is_judged_by_the_next_tracker(world: World) -> None:
    ticket = world.open({"rules": HIGH})
    world.tracker.push([Producer(ticket).points([(0, 1, 9.0)]).encode()])
    world.restart()
    world.tracker.alerts.step()
    assert [event.kind for event in world.events(ticket)] == ["alert_fired"]


def test_a_database_that_is_away_delays_alerts_and_nothing_else(tmp_path: Path, postgres: Any, template: str) -> None:
    server_of.ensure_database(postgres.url("postgres"), "alerts_away", template=template)
    world = World(tmp_path, postgres.url("alerts_away"))
    try:
        ticket, store = world.open({"rules": HIGH}), world.tracker.alerts._store
        world.tracker.alerts.step()
        away = Store("postgresql://nobody@127.0.0.1:1/x")
        world.tracker.alerts._store = away
        producer = Producer(ticket)
        acks = world.tracker.push([producer.points([(0, 0, 9.0)]).encode()])
        assert acks[0].accepted == 1
        with pytest.raises(Exception, match="not reachable"):
            world.tracker.alerts.step()
        away.close()
        world.tracker.alerts._store = store
        world.tracker.alerts.step()
        assert [event.kind for event in world.events(ticket)] == ["alert_fired"]
    finally:
        world.tracker.stop()
        world.store.close()
        server_of.drop_database(postgres.url("postgres"), "alerts_away")


# -- notifiers ---------------------------------------------------------------------------------------------------------

NOTICE = Notice(
    key="r1/high/0/train%2Floss/1/fired", subject="r1/high/0/train%2Floss/1", kind="fired", level="warning",
    title="high fired in <calm & fox>", message="train/loss is 6 (> 5)", at=1_700_000_000.0, run="r1",
    run_name="<calm & fox>", experiment="digits", attempt=2, details={"metric": "train/loss", "value": 6.0, "step": 17},
)  # fmt: skip


def test_slack_gets_blocks_within_its_limits() -> None:
    with HttpReceiver() as receiver:
        send("slack", {"webhook": receiver.url("/services/T/B/x"), "channel": "#ml-ops"}, NOTICE)
        (got,) = receiver.received
    assert got.path == "/services/T/B/x"
    assert got.headers["Content-Type"].startswith("application/json")
    assert got.body["channel"] == "#ml-ops"
    assert got.body["text"] == "high fired in &lt;calm &amp; fox&gt;", "Slack's three characters are escaped"
    header, section, fields, context = got.body["blocks"]
    assert header == {
        "type": "header", "text": {"type": "plain_text", "text": "high fired in <calm & fox>", "emoji": False}
    }  # fmt: skip
    assert section == {"type": "section", "text": {"type": "mrkdwn", "text": "train/loss is 6 (&gt; 5)"}}
    assert {"type": "mrkdwn", "text": "*step*\n17"} in fields["fields"]
    assert len(fields["fields"]) <= 10
    assert context["type"] == "context"
    assert "2023-11-14T22:13:20Z" in context["elements"][0]["text"]


def test_what_is_too_long_for_slack_is_cut() -> None:
    long = Notice(**{**{f: getattr(NOTICE, f) for f in NOTICE.__slots__}, "title": "t" * 999, "message": "m" * 9999})
    with HttpReceiver() as receiver:
        send("slack", {"webhook": receiver.url()}, long)
        header, section, *_ = receiver.received[0].body["blocks"]
    assert len(header["text"]["text"]) == 150
    assert len(section["text"]["text"]) == 3000


def test_pagerduty_is_triggered_and_resolved_under_one_key() -> None:
    over = Notice(**{**{f: getattr(NOTICE, f) for f in NOTICE.__slots__}, "kind": "resolved", "level": "info"})
    with HttpReceiver() as receiver:
        for notice in (NOTICE, over):
            send("pagerduty", {"routing_key": "R" * 32, "url": receiver.url("/v2/enqueue")}, notice)
        trigger, resolve = (each.body for each in receiver.received)
    assert (trigger["routing_key"], trigger["event_action"]) == ("R" * 32, "trigger")
    assert resolve["event_action"] == "resolve"
    assert trigger["dedup_key"] == resolve["dedup_key"] == NOTICE.subject
    payload = trigger["payload"]
    assert payload["summary"] == "high fired in <calm & fox>: train/loss is 6 (> 5)"
    assert (payload["severity"], payload["source"]) == ("warning", "<calm & fox>")
    assert payload["timestamp"] == "2023-11-14T22:13:20Z"
    assert payload["custom_details"]["step"] == "17"


def test_a_webhook_gets_all_of_it_with_a_key_and_its_token() -> None:
    with HttpReceiver() as receiver:
        send("webhook", {"url": receiver.url(), "token": "t0ken-of-ours"}, NOTICE)
        (got,) = receiver.received
    assert got.headers["Idempotency-Key"] == got.body["key"] == NOTICE.key
    assert got.headers["Authorization"] == "Bearer t0ken-of-ours"
    assert got.body["details"] == {"metric": "train/loss", "value": 6.0, "step": 17}
    assert (got.body["kind"], got.body["run"], got.body["attempt"], got.body["protocol"]) == ("fired", "r1", 2, 1)


def test_a_letter_has_the_headers_by_which_mailboxes_know_it() -> None:
    with SmtpReceiver() as receiver:
        options = {"host": "127.0.0.1", "port": receiver.port, "to": ["a@x.org", "b@x.org"], "sender": "orc@x.org"}
        send("email", options, NOTICE)
        ((sender, recipients, letter),) = receiver.letters
    assert (sender, recipients) == ("orc@x.org", ["a@x.org", "b@x.org"])
    assert letter["Subject"] == "[orc] high fired in <calm & fox>"
    assert letter["To"] == "a@x.org, b@x.org"
    assert letter["Message-ID"] == "<r1=2fhigh=2f0=2ftrain=252Floss=2f1=2ffired@ray-orchestrator>"
    assert letter["References"] == "<r1=2fhigh=2f0=2ftrain=252Floss=2f1@ray-orchestrator>"
    assert letter["Auto-Submitted"] == "auto-generated"
    assert letter["Date"] == "Tue, 14 Nov 2023 22:13:20 +0000"
    text = letter.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert b"train/loss is 6 (> 5)" in text


def test_a_title_with_a_line_break_adds_no_header() -> None:
    evil = Notice(**{**{f: getattr(NOTICE, f) for f in NOTICE.__slots__}, "title": "a\r\nBcc: all@x.org"})
    with SmtpReceiver() as receiver:
        send("email", {"host": "127.0.0.1", "port": receiver.port, "to": ["a@x.org"], "sender": "o@x.org"}, evil)
        ((_, recipients, letter),) = receiver.letters
    assert (recipients, letter["Bcc"]) == (["a@x.org"], None)
    assert letter["Subject"] == "[orc] a Bcc: all@x.org"


def test_a_password_is_not_sent_in_clear() -> None:
    with SmtpReceiver() as receiver:
        options = {"host": "127.0.0.1", "port": receiver.port, "to": ["a@x.org"], "user": "u", "password": "p"}
        with pytest.raises(NotSent, match="no encryption") as caught:
            send("email", {**options, "encryption": "auto"}, NOTICE)
    assert caught.value.is_final


@pytest.mark.parametrize(("answer", "is_final"), [(500, False), (503, False), (429, False), (404, True), (302, True)])
def test_what_another_try_may_mend_is_told_from_what_it_may_not(answer: int, is_final: bool) -> None:
    with HttpReceiver(answers=[answer]) as receiver, pytest.raises(NotSent, match=f"HTTP {answer}") as caught:
        send("webhook", {"url": receiver.url("/secret-path")}, NOTICE)
    assert caught.value.is_final is is_final
    assert len(receiver.received) == 1, "nothing is followed to another address"
    assert "secret-path" not in str(caught.value)


@pytest.mark.parametrize(
    "words", [b"", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/9.9 abc\r\n\r\n", b"\0" * 70_000]
)
def test_what_is_no_server_of_the_kind_is_tried_again(words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(words)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(NotSent) as caught:
            send("webhook", {"url": f"http://127.0.0.1:{server.getsockname()[1]}/secret-path"}, NOTICE)
        thread.join()
    assert not caught.value.is_final
    assert "secret-path" not in str(caught.value)


def test_a_mail_server_that_refuses_for_now_is_tried_again() -> None:
    with SmtpReceiver(refuse=["450 later", "550 nobody here"]) as receiver:
        options = {"host": "127.0.0.1", "port": receiver.port, "to": ["a@x.org"], "sender": "o@x.org"}
        finals = []
        for _ in range(2):
            with pytest.raises(NotSent) as caught:
                send("email", options, NOTICE)
            finals.append(caught.value.is_final)
    assert finals == [False, True]


# -- the outbox --------------------------------------------------------------------------------------------------------


def test_a_server_that_fails_twice_is_told_the_third_time(world: World) -> None:
    with HttpReceiver(answers=[500, 500]) as receiver:
        ticket = world.open({"rules": HIGH, "notify": ["log", {"webhook": receiver.url()}]})
        began = world.clock.now()
        world.log(Producer(ticket), 6.0)
        world.deliver()
        assert len({each.headers["Idempotency-Key"] for each in receiver.received}) == 1
        assert len(receiver.received) == 3
    assert 2.2 <= world.clock.now() - began <= 6, "the second pause is twice the first"
    (_, (kind, message)) = world.told(ticket)
    assert (kind, message.partition(":")[0]) == ("notified", "webhook was told (try 3)")


def test_a_server_that_is_down_for_ever_is_reported_and_holds_up_nobody(world: World) -> None:
    with socket.socket() as closed, HttpReceiver() as receiver:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/a-secret-path"
        ticket = world.open({"rules": HIGH, "notify": [{"slack": dead}, {"webhook": receiver.url()}]})
        world.log(Producer(ticket), 6.0)
        world.deliver()
        assert len(receiver.received) == 1
    kinds = [kind for kind, _ in world.told(ticket)]
    assert kinds == ["alert_fired", "notified", "notification_failed"]
    failed = world.events(ticket)[-1]
    assert (failed.level, failed.details["tries"]) == ("error", 8)
    (row,) = world.store.notifications(ticket.run)
    assert (row.state, row.notifier) == ("failed", "slack")
    assert "a-secret-path" not in failed.message + row.error


def test_a_server_that_stalls_holds_up_nobody(world: World) -> None:
    never = threading.Event()
    with HttpReceiver(answers=[never]) as stalled, HttpReceiver() as receiver:
        ticket = world.open({"rules": HIGH, "notify": [{"slack": stalled.url()}, {"webhook": receiver.url()}]})
        world.log(Producer(ticket), 6.0)
        outbox = world.tracker.alerts.outbox
        outbox._patience = 45.0
        outbox.look()
        outbox.step()
        stalled.wait_for(1)
        receiver.wait_for(1)
        assert world.tracker.push([Producer(ticket, rank=1).points([(0, 1, 1.0)]).encode()])[0].accepted == 1
        world.clock.advance(46.0)
        for _ in range(3):
            outbox.step()
        world.clock.advance(5.0)
        outbox.look()
        outbox.step()
        stalled.wait_for(2)
        first, second = stalled.received
        assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
        never.set()


def test_a_tracker_killed_between_firing_and_sending_tells_it_once(world: World) -> None:
    with HttpReceiver() as receiver:
        ticket = world.open({"rules": HIGH, "notify": [{"webhook": receiver.url()}]})
        world.log(Producer(ticket), 6.0)
        assert receiver.received == []
        world.restart()
        world.tracker.alerts.step()
        world.deliver()
        world.restart()
        world.tracker.alerts.step()
        world.deliver()
        assert len(receiver.received) == 1
    assert [kind for kind, _ in world.told(ticket)] == ["alert_fired", "notified"]


def test_a_tracker_killed_while_sending_sends_it_again_under_the_same_key(world: World) -> None:
    with HttpReceiver() as receiver:
        ticket = world.open({"rules": HIGH, "notify": [{"webhook": receiver.url()}]})
        world.log(Producer(ticket), 6.0)
        world.tracker.alerts.outbox.look()
        world.tracker.alerts.outbox.step()  # sent, and nobody writes down that it was
        receiver.wait_for(1)
        world.restart()
        world.tracker.alerts.step()
        world.deliver()
        first, second = receiver.received
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert [kind for kind, _ in world.told(ticket)] == ["alert_fired", "notified"]


def test_a_firing_and_its_end_arrive_in_order(world: World) -> None:
    """The first try of the firing fails, and its end waits for it."""
    with HttpReceiver(answers=[500]) as receiver:
        ticket = world.open({"rules": HIGH, "notify": [{"webhook": receiver.url()}]})
        world.log(Producer(ticket), 6.0)
        world.tracker.alerts.outbox.look()
        world.tracker.alerts.outbox.step()
        receiver.wait_for(1)
        producer = Producer(ticket)
        world.log(producer, 1.0)
        world.deliver()
        assert [each.body["kind"] for each in receiver.received] == ["fired", "fired", "resolved"]


def test_another_tracker_sends_nothing_that_it_has_no_address_for(world: World, tmp_path: Path) -> None:
    with HttpReceiver() as receiver:
        ticket = world.open({"rules": HIGH, "notify": [{"webhook": receiver.url()}]})
        world.log(Producer(ticket), 6.0)
        other = AlertService(Store(world.url), tmp_path / "other.json", SystemClock())
        other.outbox.step()
        assert not other.outbox.is_busy
        other.close()
        world.deliver()
        assert len(receiver.received) == 1


def test_addresses_are_on_the_disk_for_their_owner_only_and_nowhere_in_the_database(world: World) -> None:
    canary = "canary-7f3a91"
    with HttpReceiver() as receiver:
        ticket = world.open(
            {"rules": HIGH, "notify": [{"webhook": {"url": receiver.url(f"/{canary}"), "token": f"{canary}-token"}}]}
        )
        world.log(Producer(ticket), 6.0)
        world.deliver()
        assert receiver.received[0].path == f"/{canary}"
    file = world.directory / "wal-addresses.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert canary in file.read_text()
    stored = [
        *world.events(ticket),
        *world.store.notifications(ticket.run, only_unsent=False),
        *world.store.attempts(ticket.run),
        *world.store.watched_runs(json.loads(file.read_text())["place"]),
    ]
    assert len(stored) >= 5
    assert canary not in repr(stored)
    assert not [path for path in (world.directory / "wal").iterdir() if canary.encode() in path.read_bytes()]


# -- of a job ----------------------------------------------------------------------------------------------------------


def test_who_wants_to_know_is_told_of_the_end_of_a_job(world: World) -> None:
    with HttpReceiver() as receiver, HttpReceiver() as failures:
        notify = [{"webhook": receiver.url()}, {"slack": {"webhook": failures.url(), "on": "failure"}}]
        good, bad = world.open(notify=notify), world.open(notify=notify)
        world.end(good, RunStatus.finished)
        world.end(bad, RunStatus.failed, reason="ValueError: no data", error={"type": "ValueError", "rank": 1})
        world.end(bad, RunStatus.failed)
        world.deliver()
        told = {each.body["run"]: each.body for each in receiver.received}
        assert len(receiver.received) == 2
        assert (told[good.run]["kind"], told[bad.run]["kind"]) == ("completion", "failure")
        assert told[bad.run]["message"] == "ValueError: no data"
        assert told[bad.run]["details"] == {"status": "FAILED", "type": "ValueError", "rank": 1}
        assert [each.body["text"] for each in failures.received] == [f"run {bad.name} FAILED"]
    assert [kind for kind, _ in world.told(good)] == ["notified"]


def test_a_failure_that_is_restarted_is_told_only_if_it_is_not(world: World) -> None:
    with HttpReceiver() as receiver:
        ticket = world.open(notify=[{"webhook": receiver.url()}])
        world.end(ticket, RunStatus.failed, restarts=True)
        world.tracker.alerts.outbox.look()
        world.tracker.alerts.outbox.step()
        assert receiver.received == []
        world.tracker.commit_step()
        again = world.open(notify=[{"webhook": receiver.url()}], run=ticket.run)
        assert again.attempt == 2
        world.clock.advance(RESTARTED + 1)
        world.deliver()
        assert receiver.received == [], "the run went on"
        world.end(again, RunStatus.failed, restarts=True)
        world.clock.advance(RESTARTED + 1)
        world.deliver()
        assert [each.body["attempt"] for each in receiver.received] == [2], "nobody restarted it"


def test_a_driver_that_vanishes_is_a_failure(world: World) -> None:
    with HttpReceiver() as receiver:
        ticket = world.open(notify=[{"webhook": receiver.url()}])
        world.clock.advance(100.0)
        world.tracker.lease_step()
        world.tracker.alerts.step()
        world.deliver()
        (got,) = receiver.received
    assert (got.body["run"], got.body["details"]["status"]) == (ticket.run, "CRASHED")
    assert "no sign of life" in got.body["message"]


def test_an_end_that_a_killed_tracker_had_stored_is_told_by_the_next_one(world: World) -> None:
    with HttpReceiver() as receiver:
        ticket = world.open(notify=[{"webhook": receiver.url()}])
        batch = Producer(ticket, rank=-1).facts(fact(FactKind.status, status="FINISHED"))
        world.tracker.push([batch.encode()])
        assert world.tracker.commit_step()
        world.restart()
        for _ in range(2):
            world.tracker.alerts.step()
        world.deliver()
        assert [each.body["kind"] for each in receiver.received] == ["completion"]


def test_the_loops_do_all_of_it_by_themselves(tmp_path: Path, schema_url: str) -> None:
    tracker = TrackerService(tmp_path / "wal", schema_url)
    tracker.start()
    try:
        with HttpReceiver(answers=[500]) as receiver:
            settings = build(Settings, {"alerts": {"rules": HIGH, "notify": [{"webhook": receiver.url()}]}})
            alerts = planned(settings.alerts, [], {})
            ticket = tracker.open_run(RunSpec(experiment="digits", storage_url="/tmp/runs", alerts=alerts))
            tracker.push([Producer(ticket).points([(0, 1, 9.0)]).encode()])
            first, second = receiver.wait_for(2)
            assert first.body == second.body
    finally:
        tracker.stop()


# -- the command line --------------------------------------------------------------------------------------------------


def orc(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = main.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_list_shows_what_fires_and_what_could_not_be_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Stack(home=str(tmp_path), database_url=world.url).save()
    with HttpReceiver(answers=[404]) as receiver:
        ticket = world.open({"rules": HIGH, "notify": [{"webhook": receiver.url("/a-secret-path")}]})
        producer = Producer(ticket)
        world.log(producer, 6.0)
        world.deliver()
    code, found = orc(capsys, "alerts", "ls", ticket.run, "--home", str(tmp_path))
    assert code == 0
    assert [(each["rule"], each["is_firing"], each["value"]) for each in found["alerts"]] == [("high", True, 6.0)]
    (unsent,) = found["not_told"]
    assert (unsent["notifier"], unsent["state"], unsent["tries"]) == ("webhook", "failed", 1)
    assert unsent["error"].startswith("HTTP 404")
    world.log(producer, 1.0)
    assert orc(capsys, "alerts", "ls", ticket.run, "--home", str(tmp_path))[1]["alerts"] == []
    _, everything = orc(capsys, "alerts", "ls", ticket.run, "--all", "--home", str(tmp_path))
    assert [each["is_firing"] for each in everything["alerts"]] == [False]
    assert main.main(["alerts", "ls", ticket.run, "--home", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "nothing fires" in text
    assert "a-secret-path" not in text
    _, story = orc(capsys, "show", ticket.run, "--home", str(tmp_path))
    assert {"alert_fired", "alert_resolved"} <= {event["kind"] for event in story["events"]}


def test_a_test_message_is_sent_to_each_notifier(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HttpReceiver(answers=[200, 403]) as receiver, SmtpReceiver() as mail:
        monkeypatch.setenv("ORC_SLACK_WEBHOOK", receiver.url("/slack"))
        letters = ["alerts.email.host=127.0.0.1", f"alerts.email.port={mail.port}", "alerts.email.to=[a@x.org]"]
        code, found = orc(capsys, "alerts", "test", "slack", "email", *letters)
        assert (code, [(each["notifier"], each["ok"]) for each in found]) == (0, [("slack", True), ("email", True)])
        assert [each.path for each in receiver.received] == ["/slack"]
        assert mail.letters[0][2]["Subject"] == "[orc] test of a notifier"
        code, (refused,) = orc(capsys, "alerts", "test", "slack")
        assert (code, refused["ok"], refused["error"]) == (1, False, "HTTP 403: no_service")
    assert main.main(["alerts", "test", "slak"]) == 2
    assert "Did you mean 'slack'" in capsys.readouterr().err
