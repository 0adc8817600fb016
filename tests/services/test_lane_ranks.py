"""The ranks of a lane outlive the trainings that fail in them: two processes, gloo, the real desk, no Ray."""

from __future__ import annotations

from orchestrator.sweeps.jobs import Ended
from tests.plugins.lane_ranks import LaneRanks

ROUTES = {"raises": "ValueError: bad data", "backward": "ArithmeticError: no gradient today",
          "late": "ValueError: after the last collective"}  # fmt: skip


def test_a_failure_frees_the_rank_that_waits_for_it_and_both_train_on_in_a_new_process_group() -> None:
    with LaneRanks() as ranks:
        kinds = ["good", "raises", "good", "backward", "late", "good"]
        endings = ranks.train(kinds)
        for kind, ending in zip(kinds, endings, strict=True):
            how = Ended.complete if kind == "good" else Ended.failed
            assert (ending.how, kind) == (how, kind), ending
            assert ending.reason.startswith(ROUTES.get(kind, "")), "the first cause, not who was hung up on"
        assert ranks.close() == [0, 0]
