"""Loops of ranks as a TorchTrainer. The only module that knows Ray Train's arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from orchestrator.execution.ray_names import Identity, LaneIdentity, title_process, worker_names
from orchestrator.execution.ray_pointer import KEPT, RayPointers, pointer_callbacks
from orchestrator.execution.worker import Plan, Returned, train_rank


def torch_trainer(
    loop: Callable[[], Any],
    *,
    identity: Identity | LaneIdentity,
    name: str,
    workers: int,
    resources_per_worker: dict[str, float],
    placement: str,
    storage: str,
    without: Sequence[str] = (),
    callbacks: list[Any] | None = None,
    timeout: float = 1800.0,
) -> Any:
    """A TorchTrainer (Train V2) of which every rank runs `loop` once; `name` is that of its directory in `storage`.
    `without`: ids of nodes where no rank may be. `timeout`: seconds that ranks wait for each other.

    Ray Train neither retries nor resumes here: restarts are attempts, which are ours to number, and resuming needs no
    snapshot of Ray's. Metrics never go through `train.report`, only pointers to checkpoints do; see ray_pointer.py.
    """
    from ray.train.torch import TorchConfig, TorchTrainer

    # Those of ray.train are an older engine's for who reads its types.
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    uses_gpu = resources_per_worker.get("GPU", 0) > 0
    scaling = ScalingConfig(
        num_workers=workers,
        use_gpu=uses_gpu,
        resources_per_worker=resources_per_worker,
        placement_strategy=placement,
        label_selector={"ray.io/node-id": f"!in({','.join(without)})"} if without else None,
    )
    run_config = RunConfig(
        name=name,
        storage_path=storage,
        failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=2),
        checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        callbacks=[*worker_names(identity), *(callbacks or [])],
    )

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # There are no Ray Datasets here. Their callback starts an actor and has every rank load ray.data: seconds.
            given = super()._create_default_callbacks()  # type: ignore[misc]  # what Train V2's trainer has
            return [each for each in given if type(each).__name__ != "DatasetsCallback"]

    # Not as `train_loop_config`, which Ray Train keeps and exports: the plan holds the user's secrets in clear.
    torch_config = TorchConfig(timeout_s=math.ceil(timeout))
    return Trainer(cast(Any, loop), torch_config=torch_config, scaling_config=scaling, run_config=cast(Any, run_config))


def attempt_trainer(plan: Plan, *, storage: str, **resources: Any) -> Any:
    """Runs `plan` once. `resources` are `torch_trainer`'s."""
    ticket = plan.ticket
    identity = Identity.of(ticket)
    name = f"{ticket.run}-attempt-{ticket.attempt}"  # a directory: the run's own name may hold a slash
    forgiving = pointer_callbacks()
    has_pointers = bool(forgiving)
    directory = Path(storage) / name

    def loop() -> Returned:
        import ray.train

        context = ray.train.get_context()
        rank = context.get_world_rank()
        title_process(identity.process(rank))
        return train_rank(
            plan,
            rank=rank,
            world_size=context.get_world_size(),
            local_rank=context.get_local_rank(),
            node=ray.get_runtime_context().get_node_id(),
            pointers=RayPointers(directory, rank=rank) if has_pointers else None,
        )

    return torch_trainer(
        loop, identity=identity, name=name, storage=storage, callbacks=forgiving, timeout=plan.collective_timeout,
        **resources,
    )  # fmt: skip


def lane_trainer(identity: LaneIdentity, *, desk: str, growth: int, storage: str, **resources: Any) -> Any:
    """Runs a generation of a lane, which takes its jobs from the desk of that name. `growth` in bytes, see
    lane_worker.py; `resources` are `torch_trainer`'s. Pointers of Ray Train do not exist on lanes: what one job left in
    its queue would be the next one's."""

    def loop() -> str:
        import ray.train

        from orchestrator.execution.handles import RemoteDesk
        from orchestrator.execution.lane_worker import serve

        context = ray.train.get_context()
        rank = context.get_world_rank()
        title_process(identity.process(rank))
        return serve(
            RemoteDesk(desk),
            lane=identity.lane,
            generation=identity.generation,
            rank=rank,
            world_size=context.get_world_size(),
            local_rank=context.get_local_rank(),
            node=ray.get_runtime_context().get_node_id(),
            growth=growth,
            title=title_process,
        )

    name = f"{identity.sweep}-lane-{identity.lane}-g{identity.generation}"
    return torch_trainer(loop, identity=identity, name=name, storage=storage, **resources)
