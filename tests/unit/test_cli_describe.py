"""What `orc ls` and `orc show` say about a run, from given rows."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest

from orchestrator.cli import describe
from orchestrator.cli.output import Output
from orchestrator.records import RunStatus
from orchestrator.store.views import AttemptRow, CheckpointRow, EventRow, ParamRow, RunDetail, SummaryRow

NOW = 1_700_010_000.0

RUN = RunDetail(
    run="r-123",
    name="brave-otter",
    experiment="digits",
    project="default",
    user="ada",
    status=RunStatus.failed,
    reason="rank 1 raised",
    attempt=2,
    workers=2,
    job="raysubmit_1",
    sweep="",
    created=NOW - 7200,
    started=NOW - 7200,
    ended=NOW - 3600,
    tags={"team": "vision"},
    description="",
    directory="/runs/digits/r-123",
    config={},
    config_hash="abcdef0123456789",
    seed=7,
    model={},
    dataset={},
    error={"type": "ValueError", "message": "bad\nshape", "rank": 1},
    cancel_requested=None,
    cancel_requested_by="",
    parents={},
    links={},
)


def summary(key: str, *, rank: int = 0, direction: str = "", last: float = 0.5) -> SummaryRow:
    return SummaryRow(
        run="r-123",
        key=key,
        rank=rank,
        unit="",
        direction=direction,
        reduction="",
        count=3,
        nan_count=1,
        inf_count=0,
        first=math.nan,
        first_step=0,
        first_time=NOW,
        last=last,
        last_step=9,
        last_time=NOW,
        last_attempt=1,
        minimum=0.1,
        min_step=2,
        maximum=0.9,
        max_step=5,
        mean=0.5,
    )


def story(run: RunDetail = RUN) -> describe.Story:
    return describe.Story(
        run=run,
        attempts=[
            AttemptRow(
                run="r-123",
                attempt=number,
                status=RunStatus.failed,
                reason="",
                error=None,
                user="",
                job="",
                workers=2,
                config_hash="",
                started=NOW - 7200,
                ended=NOW - 3600,
                lease_until=None,
                provenance={},
            )
            for number in (1, 2)
        ],
        params=[ParamRow(name="optim.lr", type="float", value=0.01)],
        summaries=[summary("val/accuracy", direction="max"), summary("val/accuracy", rank=1), summary("train/loss")],
        checkpoints=[
            CheckpointRow(
                run="r-123",
                id="step-9",
                attempt=1,
                uri="/c",
                state="committed",
                step=9,
                epoch=1,
                label="",
                metrics={},
                is_best=True,
                is_pinned=False,
                size_bytes=2048,
                duration=0.1,
                manifest_sha256="",
                cipher="",
                key_id="",
                created=NOW - 60,
            )
        ],
        artifacts=[],
        notes=[],
        events=[
            EventRow(
                id=1,
                run="r-123",
                attempt=1,
                rank=1,
                at=NOW - 61,
                level="error",
                kind="failed",
                message="it [broke]",
                step=None,
                user="",
                details={},
            )
        ],
        links=describe.links(run, ray_dashboard="http://127.0.0.1:8265"),
    )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_show_tells_everything_on_terminals_and_in_files(is_terminal: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    output = Output(stdout=stream, stderr=io.StringIO())
    output.result({}, lambda: story().render(output, NOW))
    shown = stream.getvalue()
    for part in (
        "brave-otter", "FAILED", "rank 1 raised", "what   ValueError: bad", "where  rank 1", "optim.lr",
        "val/accuracy", "0.9", "3 (1 NaN)", "step-9", "2.0 KiB", "best", "it [broke]", "team=vision",
        "/runs/digits/r-123", "http://127.0.0.1:8265/#/jobs/raysubmit_1",
        "orc metrics brave-otter", "next: orc resume r-123",
    ):  # fmt: skip
        assert part in shown
    assert ("\x1b[" in shown) <= is_terminal


def test_the_document_of_show_is_strict_json_with_the_best_value_of_each_metric() -> None:
    document = json.loads(json.dumps(story().document(NOW), allow_nan=False))
    assert document["status"] == "FAILED"
    assert document["metric"] == "val/accuracy"
    assert document["params"] == {"optim.lr": 0.01}
    assert (document["summaries"][0]["best"], document["summaries"][0]["best_step"]) == (0.9, 5)
    assert document["summaries"][0]["first"] == "nan"
    assert document["duration"] == 3600
    assert document["links"]["directory"] == "/runs/digits/r-123"


def test_a_run_that_goes_on_is_followed_next() -> None:
    assert story(replace(RUN, status=RunStatus.running, ended=None)).next_line() == "orc logs r-123 --follow"


def test_the_main_metric_is_a_declared_one_of_the_lowest_rank() -> None:
    rows = [
        summary("zeta", direction="min", rank=1),
        summary("zeta", direction="min", rank=0, last=0.1),
        summary("val/a"),
    ]
    chosen = describe.main_metric(rows)
    assert chosen is not None
    assert (chosen.key, chosen.rank) == ("zeta", 0)
    assert describe.main_metric([]) is None


def test_the_link_to_mlflow_is_what_the_mirror_noted() -> None:
    url = "http://127.0.0.1:5000/#/experiments/3/runs/ab"
    mirrored = replace(RUN, links={"mlflow": {"run_id": "ab", "url": url}})
    assert describe.links(mirrored, ray_dashboard="")["mlflow"] == url
    assert "mlflow" not in describe.links(replace(RUN, links={"mlflow": {"run_id": "ab", "url": ""}}), ray_dashboard="")
    assert "mlflow" not in describe.links(replace(RUN, links={}), ray_dashboard="")


def test_a_directory_is_shown_without_the_key_of_its_bucket() -> None:
    run = replace(RUN, directory="s3://key:hushhush@bucket/runs/r-123?region=x")
    assert describe.links(run, ray_dashboard="")["directory"] == "s3://key:***@bucket/runs/r-123?region=x"
    assert describe.links(RUN, ray_dashboard="")["directory"] == RUN.directory


def test_a_narrow_terminal_shows_fewer_columns_instead_of_broken_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    output = Output(stdout=stream, stderr=io.StringIO())
    cells = [describe.run_cells(RUN, summary("val/accuracy", direction="max"), NOW)]
    output.table(describe.RUN_COLUMNS, cells, optional=describe.RUN_COLUMNS_OPTIONAL)
    shown = stream.getvalue()
    assert "brave-otter" in shown
    assert "val/accuracy" in shown
    assert len(shown.splitlines()) == 3
    assert "r-123" not in shown
