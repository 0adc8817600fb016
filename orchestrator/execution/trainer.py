"""A plan and its resources as a TorchTrainer. The only module that knows Ray Train's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from orchestrator.execution.ray_names import Identity, title_process, worker_names
from orchestrator.execution.ray_pointer import KEPT, RayPointers, pointer_callbacks
from orchestrator.execution.worker import Plan, train_rank


def torch_trainer(
    plan: Plan, *, workers: int, resources_per_worker: dict[str, float], placement: str, storage: str
) -> Any:
    """A TorchTrainer (Train V2) that runs `plan` once.

    Ray Train neither retries nor resumes here: restarts are attempts, which are ours to number, and resuming needs no
    snapshot of Ray's. Metrics never go through `train.report`, only pointers to checkpoints do; see ray_pointer.py.
    """
    import ray.train
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig  # ray.train has an older engine's

    uses_gpu = resources_per_worker.get("GPU", 0) > 0
    scaling = ScalingConfig(
        num_workers=workers,
        use_gpu=uses_gpu,
        resources_per_worker=resources_per_worker,
        placement_strategy=placement,
    )
    ticket = plan.ticket
    identity = Identity.of(ticket)
    forgiving = pointer_callbacks()
    has_pointers = bool(forgiving)
    run_config = RunConfig(
        name=f"{ticket.run}-attempt-{ticket.attempt}",  # a directory: the run's own name may hold a slash
        storage_path=storage,
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
        checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
        callbacks=[*worker_names(identity), *forgiving],
    )
    directory = Path(storage) / f"{ticket.run}-attempt-{ticket.attempt}"

    def loop() -> str:
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

    # Not as `train_loop_config`, which Ray Train keeps and exports: the plan holds the user's secrets in clear.
    return TorchTrainer(cast(Any, loop), scaling_config=scaling, run_config=cast(Any, run_config))
