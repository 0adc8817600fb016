"""The node's agent records what the machine does as `system/…` of the runs on it, and the ranks how fast they go."""

from __future__ import annotations

from collections.abc import Callable

from tests.plugins.runs import Going, Orc, wait_until


def test_a_run_has_system_and_speed_metrics_without_asking(orc: Orc, going: Callable[..., Going]) -> None:
    run = going("seconds=8")
    for rank in (0, 1):
        for key in ("system/process/rss_bytes", "perf/step_time", "perf/peak_memory_bytes"):
            points = wait_until(lambda key=key, rank=rank: run.store.points(run.run, key, rank=rank), 30, key)
            assert min(points.values) > 0
    assert min(run.store.points(run.run, "system/memory_percent", rank=0).values) > 0
    assert not run.store.points(run.run, "system/memory_percent", rank=1), "the machine's values once"
    units = {row.key: row.unit for row in run.store.summaries(run.run)}
    assert units["system/memory_used_bytes"] == "bytes"
    out, err = run.process.communicate(timeout=60)
    assert run.process.returncode == 0, out + err
    last = run.store.points(run.run, "count", rank=0)
    assert last.values[-1] == run.counted(0) - 1
