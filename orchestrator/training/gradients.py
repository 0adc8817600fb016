"""The norm of a training's gradients, now and then, without waiting for a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

from orchestrator.training.steps import optimizers

logger = logging.getLogger(__name__)

MOST_WAITING = 64
"""Norms that nobody took. Of more, the oldest goes."""


class GradientNorms:
    """Looks at the gradients before every so many steps of each optimizer, the first one included. A step in between
    costs a call and a comparison. Of gradients that are divided among ranks (FSDP) this rank's part counts.

    Not looked at: what a GradScaler left to a fused optimizer, where scaled gradients may be infinite on purpose.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._watched: WeakSet[Any] = WeakSet()
        self._waiting: list[tuple[torch.Tensor, Any]] = []
        """Norms on their way to the host, each with the event that tells of its arrival (None: it is there)."""

    def watch(self, *things: Any) -> None:
        """Optimizers, or dicts of them."""
        for optimizer in optimizers(things):
            if optimizer not in self._watched:
                self._watched.add(optimizer)
                optimizer.register_step_pre_hook(self._hook())

    def take(self) -> list[float]:
        """Those that have arrived since the last time, oldest first."""
        arrived = []
        while self._waiting and (self._waiting[0][1] is None or self._waiting[0][1].query()):
            norm, _ = self._waiting.pop(0)
            arrived.append(norm.item())
        return arrived

    def _hook(self) -> Callable[..., None]:
        left, every = 1, self._every

        def hook(optimizer: Any, *_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                left = every
                self._look(optimizer)

        return hook

    def _look(self, optimizer: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            return
        try:
            norm = _norm(optimizer)
        except (RuntimeError, NotImplementedError, TypeError):  # gradients of a kind that has no norm, sparse ones say
            logger.debug("these gradients have no norm", exc_info=True)
            return
        if norm is None:
            return
        event = None
        if norm.is_cuda:
            # Into pinned memory: the copy runs behind us, and the event tells when it is over.
            norm = norm.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((norm, event))
        del self._waiting[:-MOST_WAITING]


@torch.no_grad()
def _norm(optimizer: Any) -> torch.Tensor | None:
    """The norm of all gradients together, where they are; None without any."""
    gradients = [
        parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if not gradients:
        return None
    # In half precision the norm itself would be infinite beyond 65,504.
    wide = torch.float32 if gradients[0].dtype is torch.float16 else None
    norms = torch._foreach_norm(gradients, 2, dtype=wide)
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(device, torch.float32) for norm in norms]))
