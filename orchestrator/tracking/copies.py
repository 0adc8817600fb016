"""One run (or one attempt of it) on its way to a sink: which of its points go there, and under which names. Pure:
facts, chunks and the time come in, series and tags go out; `mirror.py` sends them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orchestrator.backends.sinks import ArtifactFacts, DatasetFacts, RunFacts, Series, Target
from orchestrator.failures.explain import five_lines
from orchestrator.store.views import AttemptRow, ChunkRow, FactChanges, FeedPosition, SummaryRow
from orchestrator.tracking.curves import Arrays, Lineage, Reduction, joined
from orchestrator.tracking.decimation import Decimator

SAMPLES_OF_NONFINITE = 20
"""So many ±inf of a key are listed in its tag; their number is always exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a run's own configuration says about a sink."""

    enabled: bool = True
    other_ranks: bool = False
    experiment_prefix: str = ""

    @classmethod
    def of(cls, config: Mapping[str, Any], sink: str, *, other_ranks: bool = False) -> Wishes:
        """From the section named after the sink; `other_ranks` is what holds where it says nothing."""
        section = config.get(sink)
        if not isinstance(section, Mapping):
            return cls(other_ranks=other_ranks)
        asked = section.get("other_ranks")
        return cls(
            enabled=str(section.get("enabled", "")).lower() != "false",
            other_ranks=other_ranks if asked is None else str(asked).lower() == "true" or other_ranks,
            experiment_prefix=str(section.get("experiment_prefix") or ""),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is the same for all copies of one mirror."""

    name_for: Callable[[str], str]
    """The nearest name that the sink accepts."""
    complete: int
    """Points per key that are copied one by one."""
    grace: float
    """Seconds for which something that may come yet is waited for."""
    clips_infinity: bool = True
    """The sink cannot keep ±inf, so they are listed in tags."""


@dataclass(slots=True, kw_only=True)
class Copy:
    """How far one copy has come. `state()` is what is stored with the cursor; the rest is learned again.

    What is chosen depends on the points and their order alone, so that a process that died in between is repeated
    exactly by the next one. Where the clock decides (a rank is not waited for any longer) or something that is written
    apart from the points (a declared reduction), `decide` says so, and the decision is stored before it is acted upon.
    """

    cursor_id: str
    """Names its cursor: the run's id, or `<run>/attempt-2`."""
    attempt: int | None = None
    """Only points of this attempt; None: the run's canonical curve over all attempts."""
    target: Target
    facts: RunFacts
    rules: Rules
    wishes: Wishes = field(default_factory=Wishes)
    attempts: dict[int, AttemptRow] = field(default_factory=dict)
    is_trial: bool = False
    """Of a sweep: its attempts are stretches between decisions, and no copies of their own."""
    facts_cursor: int = 0
    position: FeedPosition = FeedPosition()
    decimators: dict[str, Decimator] = field(default_factory=dict)
    """By the curve's name (the key, or `key/rank_k`)."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Canonical rank of a key, where it is not 0."""
    reductions: dict[str, dict[int, Reduction]] = field(default_factory=dict)
    """By key and attempt, for keys with a declared reduction."""
    kinds: dict[str, str] = field(default_factory=dict)
    lineages: dict[str, Lineage] = field(default_factory=dict)
    nonfinite: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> [how many ±inf, "step:inf", …]."""
    last_ms: int = 0
    """Time of the newest copied point."""
    seen: int = 0
    """Points read from the feed, of all ranks and attempts."""
    mark: Any = None
    """The place in the sink that belongs to `position`, in the sink's own words."""
    files: dict[str, str] = field(default_factory=dict)
    """Path -> mark of what the sink has."""
    status: Any = None
    """Status and end as the sink has them; None: not known in this process."""
    sent_tags: dict[str, str] = field(default_factory=dict)
    sent_params: dict[str, str] = field(default_factory=dict)
    sent_datasets: set[DatasetFacts] = field(default_factory=set)
    failed_files: dict[str, str] = field(default_factory=dict)
    """Path -> mark of what the sink did not get, in this process."""
    file_troubles: int = 0
    waiting: dict[str, float] = field(default_factory=dict)
    """Key without a canonical rank -> since when we wait for a lower one."""
    silence: dict[tuple[str, int, bool], float] = field(default_factory=dict)
    """Key and attempt whose reduction waits for ranks that may never log it, whether the attempt is over -> since
    when."""
    pending: deque[Series] = field(default_factory=deque)
    """Read and chosen, not sent yet; the cursor moves to `pending_position` when it is empty."""
    pending_position: FeedPosition | None = None
    tags_due: dict[str, str] = field(default_factory=dict)
    """Tags that belong to points; set before the cursor moves."""
    seen_attempts: set[int] = field(default_factory=set)
    """Attempts of which points were read since somebody looked."""
    children: dict[int, Copy] = field(default_factory=dict)
    """Copies of single attempts, once there is more than one."""
    children_due: set[int] = field(default_factory=set)
    children_refused: set[int] = field(default_factory=set)
    """A person deleted them in the sink, or it does not take them: left alone in this process."""

    @property
    def held(self) -> int:
        """Points that are in memory, with those of its attempts' copies. What is kept per curve counts as ten."""
        opened = sum(len(one) for by_attempt in self.reductions.values() for one in by_attempt.values())
        pending = sum(map(len, self.pending))
        return 10 * len(self.decimators) + opened + pending + sum(child.held for child in self.children.values())

    @property
    def shows_attempts(self) -> bool:
        return len(self.attempts) > 1 and not self.is_trial

    @property
    def is_sending(self) -> bool:
        """Something was read and is not noted as sent."""
        return self.pending_position is not None or any(child.is_sending for child in self.children.values())

    # -- what is stored

    def state(self) -> dict[str, Any]:
        given = {
            "reduced": {
                key: {str(attempt): one.to_json() for attempt, one in by_attempt.items()}
                for key, by_attempt in self.reductions.items()
            },
            "lineages": {name: line.to_json() for name, line in self.lineages.items() if line.starts},
            "files": self.files,
        }
        return {
            "target": self.target.id,
            "curves": {name: decimator.to_json() for name, decimator in self.decimators.items()},
            "ranks": self.ranks,
            "kinds": self.kinds,
            "nonfinite": self.nonfinite,
            "last_ms": self.last_ms,
            "seen": self.seen,
            **({} if self.mark is None else {"mark": self.mark}),
            **{name: value for name, value in given.items() if value},
        }

    def restore(self, position: FeedPosition, state: Mapping[str, Any]) -> None:
        """Goes on where a cursor was stored."""
        self.position = position
        complete = self.rules.complete
        self.decimators = {name: Decimator.from_json(raw, complete) for name, raw in state.get("curves", {}).items()}
        self.ranks = dict(state.get("ranks", {}))
        self.kinds = dict.fromkeys(self.decimators, "") | dict(state.get("kinds", {}))
        self.reductions = {
            key: {int(attempt): Reduction.from_json(raw) for attempt, raw in by_attempt.items()}
            for key, by_attempt in state.get("reduced", {}).items()
        }
        self.lineages = {name: Lineage.from_json(raw) for name, raw in state.get("lineages", {}).items()}
        self.nonfinite = dict(state.get("nonfinite", {}))
        self.last_ms = state.get("last_ms", 0)
        self.seen = state.get("seen", sum(one.count for one in self.decimators.values()))
        self.files = dict(state.get("files", {}))

    # -- decisions

    def decide(
        self, chunks: Sequence[ChunkRow], read_summaries: Callable[[], Sequence[SummaryRow]], now: float
    ) -> tuple[list[tuple[ChunkRow, int]], bool]:
        """Each chunk with the canonical rank of its key, up to the first that has to wait for a lower rank; and
        whether something was decided that has to be stored before it is acted upon.
        """
        summaries = self._needed(chunks, read_summaries, now)
        declared = {row.key: row.reduction for row in summaries}
        first_ranks = _first_ranks(summaries)
        placed: list[tuple[ChunkRow, int]] = []
        decided = False
        for chunk in chunks:
            is_new = not self._is_settled(chunk.key)
            if is_new and declared.get(chunk.key):
                self.kinds[chunk.key] = declared[chunk.key]
                self.waiting.pop(chunk.key, None)
            rank = 0 if self.kinds.get(chunk.key) else self._canonical(chunk, first_ranks, now)
            if rank is None:
                # The cursor stands at whole rows: chunks of one row come together or not at all.
                placed = [each for each in placed if each[0].position < chunk.position]
                break
            decided |= is_new
            placed.append((chunk, rank))
        return placed, decided

    def _needed(
        self, chunks: Sequence[ChunkRow], read_summaries: Callable[[], Sequence[SummaryRow]], now: float
    ) -> Sequence[SummaryRow]:
        """Read only when a key is new or a rank other than 0 logs one whose curve is a rank's. All keys that only
        higher ranks have begin to wait here, so that a thousand of them wait once and not in turn.
        """
        if all(self._is_settled(chunk.key) for chunk in chunks):
            return ()
        summaries = read_summaries()
        declared = {row.key for row in summaries if row.reduction}
        for key, rank in _first_ranks(summaries).items():
            if rank > 0 and key not in declared and not self._is_settled(key):
                self.waiting.setdefault(key, now)
        return summaries

    def _is_settled(self, key: str) -> bool:
        return key in self.kinds

    def _canonical(self, chunk: ChunkRow, first_ranks: Mapping[str, int], now: float) -> int | None:
        """The rank whose points are the plain curve of the chunk's key; None while that is open."""
        key = chunk.key
        is_settled = self._is_settled(key)
        settled = self.ranks.get(key, 0) if is_settled else chunk.rank
        best = min(settled, chunk.rank, first_ranks.get(key, chunk.rank), key=preference)
        if best > 0 and not is_settled and not self.facts.status.is_terminal:
            # Not the age of the points: after an outage old points of one rank arrive before those of another.
            waited = now - self.waiting.setdefault(key, now)
            if waited < self.rules.grace:
                return None
        self.waiting.pop(key, None)
        self.kinds.setdefault(key, "")
        if best != 0:
            self.ranks[key] = best
        else:
            self.ranks.pop(key, None)
        return best

    def decide_on_silence(self, now: float) -> bool:
        """Stops waiting for ranks that did not log a key, and for those of attempts that are over, once `grace` has
        passed. True when something was decided.
        """
        decided = False
        for key, attempt, one in self._unfinished():
            is_over = self._is_over(attempt)
            reason = (key, attempt, is_over)
            if is_over:
                self.silence.pop((key, attempt, False), None)
            if not is_over and not one.silent:
                self.silence.pop(reason, None)  # a rank that logs is behind: it comes, or its attempt ends
            elif now - self.silence.setdefault(reason, now) >= self.rules.grace:
                one.close() if is_over else one.give_up(one.silent)
                del self.silence[reason]
                decided = True
        return decided

    def _unfinished(self) -> Iterator[tuple[str, int, Reduction]]:
        for key, by_attempt in self.reductions.items():
            for attempt, one in by_attempt.items():
                if one.waits and not one.is_closed:
                    yield key, attempt, one
                else:
                    for is_over in (False, True):
                        self.silence.pop((key, attempt, is_over), None)

    def _is_over(self, attempt: int) -> bool:
        row = self.attempts.get(attempt)
        current = max(self.attempts, default=attempt)
        return attempt < current or self.facts.status.is_terminal or (row is not None and row.status.is_terminal)

    # -- points

    def take(self, placed: Sequence[tuple[ChunkRow, int]]) -> None:
        """Turn chunks into pending series."""
        taken: dict[str, list[Arrays]] = {}
        for chunk, canonical in placed:
            self.pending_position = chunk.position
            self.seen += len(chunk.steps)
            self.seen_attempts.add(chunk.attempt)
            if self.attempt not in (None, chunk.attempt):
                continue
            for name, points in self._curves_of(chunk, canonical):
                taken.setdefault(name, []).append(self._of_lineage(name, chunk.attempt, points))
        for name, parts in taken.items():
            self._append(name, joined(parts))

    def take_decided(self) -> None:
        """What became complete by `decide_on_silence`."""
        for key, by_attempt in self.reductions.items():
            for attempt in sorted(by_attempt):
                points = self._of_lineage(key, attempt, by_attempt[attempt].take())
                if len(points[0]):
                    self._append(key, points)
                    self.pending_position = self.position

    def flush(self) -> None:
        """Give out the open windows of a run that has ended, so that its last values are right in the sink."""
        for name, decimator in self.decimators.items():
            rest = _series(self.rules.name_for(name), decimator.flush())
            if len(rest):
                self.pending.append(rest)
                self.pending_position = self.position

    def _curves_of(self, chunk: ChunkRow, canonical: int) -> Iterator[tuple[str, Arrays]]:
        """The curves that the chunk is part of, and what it adds to each."""
        times_ms = np.maximum(0, np.rint(chunk.times * 1000.0)).astype(np.int64)
        points = chunk.steps.astype(np.int64), times_ms, chunk.values.astype(np.float64)
        kind = self.kinds.get(chunk.key)
        if kind:
            one = self._reduction(chunk.key, chunk.attempt, kind)
            one.add(chunk.rank, *points)
            yield chunk.key, one.take()
            if one.late:
                self._note(f"orc.late.{chunk.key}", f"{one.late} points came too late to be part of the {kind}")
        elif chunk.rank == canonical:
            yield chunk.key, points
            return
        if self.wishes.other_ranks:
            yield f"{chunk.key}/rank_{chunk.rank}", points

    def _reduction(self, key: str, attempt: int, kind: str) -> Reduction:
        by_attempt = self.reductions.setdefault(key, {})
        if attempt not in by_attempt:
            row = self.attempts.get(attempt)
            by_attempt[attempt] = Reduction(kind, set(range(row.workers)) if row else set())
            self._note(f"orc.reduction.{key}", f"{kind} over ranks")
        return by_attempt[attempt]

    def _of_lineage(self, name: str, attempt: int, points: Arrays) -> Arrays:
        if self.attempt is not None:
            return points
        return self.lineages.setdefault(name, Lineage()).keep(attempt, points)

    def _append(self, name: str, points: Arrays) -> None:
        steps, times_ms, values = points
        if not len(steps):
            return
        self.last_ms = max(self.last_ms, int(times_ms.max()))
        sent_as = self.rules.name_for(name)
        if sent_as != name:
            self._note(f"orc.key.{sent_as}", name)
        if self.rules.clips_infinity:
            self._note_nonfinite(name, steps, values)
        decimator = self.decimators.setdefault(name, Decimator(complete=self.rules.complete))
        chosen = _series(sent_as, decimator.add(steps, times_ms, values))
        if decimator.is_decimated:
            text = f"complete up to {decimator.complete} points, then min, max and last of each window"
            self._note(f"orc.decimated.{name}", text)
        if len(chosen):
            self.pending.append(chosen)

    def _note_nonfinite(self, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        infinite = np.flatnonzero(np.isinf(values))
        if not len(infinite):
            return
        noted = self.nonfinite.setdefault(name, [0])
        noted[0] += len(infinite)
        room = max(0, SAMPLES_OF_NONFINITE - (len(noted) - 1))
        noted += [f"{steps[i]}:{'inf' if values[i] > 0 else '-inf'}" for i in infinite[:room]]
        more = noted[0] - (len(noted) - 1)
        self._note(f"orc.nonfinite.{name}", ",".join(noted[1:]) + (f" and {more} more" if more else ""))

    def _note(self, tag: str, text: str) -> None:
        self.tags_due[self.rules.name_for(tag)] = text


# -- facts ------------------------------------------------------------------------------------------------------------


def facts_of(changes: FactChanges, before: RunFacts | None = None) -> RunFacts:
    """A run's facts from all of its changes (`before` None), or from those since `before`."""
    run = changes.run
    was = before or RunFacts(id=run.run, experiment=run.experiment, name=run.name)
    source = run.config.get("train", "") if isinstance(run.config.get("train", ""), str) else ""
    git, host, datasets = was.git, was.host, was.datasets
    for attempt in changes.attempts:
        git, host, datasets = _provenance(attempt.provenance, (git, host, datasets))
    return RunFacts(
        id=run.run, experiment=run.experiment, name=run.name, project=run.project,
        parent=next((parent for parent, kind in run.parents.items() if kind == "parent"), ""),
        status=run.status, reason=run.reason, error=_error_text(run.error),
        failure=_failure(run.error), attempt=run.attempt,
        start_ms=_ms(run.created if run.started is None else run.started),
        end_ms=None if run.ended is None else _ms(run.ended),
        user=run.user, source=source, description=run.description,
        notes=tuple(dict.fromkeys((*was.notes, *(note.text for note in changes.notes)))),
        params={**was.params, **{row.name: row.value for row in changes.params}},
        tags={**was.tags, **changes.tags},
        artifacts=_artifacts(changes, was.artifacts),
        datasets=tuple(dict.fromkeys((*datasets, *_datasets(run.dataset)))),
        config=run.config, config_hash=run.config_hash, directory=run.directory, job=run.job, host=host, git=git,
        version=changes.cursor,
    )  # fmt: skip


def attempt_facts(run: RunFacts, row: AttemptRow) -> RunFacts:
    """What is shown of one attempt: its own end, its own surroundings, and whose attempt it is."""
    git, host, datasets = _provenance(row.provenance, ({}, "", ()))
    return RunFacts(
        id=run.id, experiment=run.experiment, name=f"{run.name} attempt {row.attempt}", project=run.project,
        parent=run.id, attempt_of=run.id, attempt=row.attempt, status=row.status, reason=row.reason,
        error=_error_text(row.error), failure=_failure(row.error), start_ms=_ms(row.started),
        end_ms=None if row.ended is None else _ms(row.ended), user=row.user or run.user, source=run.source,
        datasets=datasets, config_hash=row.config_hash, directory=run.directory, job=row.job, host=host, git=git,
        version=run.version,
    )  # fmt: skip


def prefixed(facts: RunFacts, wishes: Wishes) -> RunFacts:
    return replace(facts, experiment=wishes.experiment_prefix + facts.experiment) if wishes.experiment_prefix else facts


def _provenance(
    provenance: Mapping[str, Any], before: tuple[Mapping[str, Any], str, Sequence[DatasetFacts]]
) -> tuple[Mapping[str, Any], str, tuple[DatasetFacts, ...]]:
    """Git, host and datasets; what an attempt does not say stays as it was before."""
    git, host, datasets = before
    found = provenance.get("git")
    return (
        found if isinstance(found, Mapping) else git,
        str(provenance.get("host") or host),
        tuple(dict.fromkeys((*datasets, *_datasets(provenance.get("datasets"))))),
    )


def _datasets(said: Any) -> list[DatasetFacts]:
    """From a list of declarations, or a mapping of them by any key; what is no declaration is passed over."""
    if isinstance(said, Mapping):
        inner = said.get("datasets")
        if isinstance(inner, (list, tuple, Mapping)):
            return _datasets(inner)
        if isinstance(said.get("name"), str):
            said = [said]
        else:
            said = [{"name": key, **one} for key, one in said.items() if isinstance(one, Mapping)]
    if not isinstance(said, (list, tuple)):
        return []
    return [_dataset(one) for one in said if isinstance(one, Mapping) and one.get("name")]


def _dataset(said: Mapping[str, Any]) -> DatasetFacts:
    size = said.get("size")
    texts = {name: str(said.get(name) or "") for name in ("name", "fingerprint", "uri", "version", "split")}
    return DatasetFacts(**texts, size=size if isinstance(size, int) and not isinstance(size, bool) else None)


def _artifacts(changes: FactChanges, before: Sequence[ArtifactFacts]) -> tuple[ArtifactFacts, ...]:
    known = {(one.name, one.step): one for one in before}
    for row in changes.artifacts:
        known.pop((row.name, row.step), None)  # written again: the newest is last
        known[row.name, row.step] = ArtifactFacts(
            name=row.name, uri=row.uri, attempt=row.attempt, step=row.step, media_type=row.media_type,
            size_bytes=row.size_bytes, sha256=row.sha256,
        )  # fmt: skip
    return tuple(known.values())


def _error_text(error: Mapping[str, Any] | None) -> str:
    if not error:
        return ""
    rank = error.get("rank")
    text = ": ".join(str(error[name]) for name in ("type", "message") if error.get(name))
    return f"rank {rank}: {text}" if rank is not None else text


def _failure(error: Mapping[str, Any] | None) -> dict[str, str]:
    return {"kind": str(error.get("kind") or "unknown"), **dict(five_lines(error))} if error else {}


# -- small parts ------------------------------------------------------------------------------------------------------


def preference(rank: int) -> int:
    """Rank 0 first, then the driver (-1) and services, then 1, 2, 3 …"""
    return 0 if rank == 0 else 1 if rank < 0 else rank + 1


def _first_ranks(summaries: Iterable[SummaryRow]) -> dict[str, int]:
    """The preferred one of the ranks that have points of a key, by key."""
    first: dict[str, int] = {}
    for row in summaries:
        first[row.key] = min(first.get(row.key, row.rank), row.rank, key=preference)
    return first


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _series(name: str, points: Arrays) -> Series:
    return Series(name=name, steps=points[0], times_ms=points[1], values=points[2])


def head(pending: Iterable[Series], limit: int) -> list[Series]:
    """The first `limit` points, key after key: few keys with many steps make the cheapest requests."""
    return list(_heads(pending, limit))


def _heads(pending: Iterable[Series], room: int) -> Iterator[Series]:
    for series in pending:
        if room <= 0:
            return
        part = series.part(0, room)
        room -= len(part)
        yield part


def drop(pending: deque[Series], count: int) -> None:
    while count:
        first = pending.popleft()
        if len(first) > count:
            pending.appendleft(first.part(count))
            return
        count -= len(first)
