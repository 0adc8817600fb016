"""The norm of a training's gradients, now and then, without waiting for a device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch

from orchestrator.training.guards import Look
from orchestrator.training.steps import optimizers

logger = logging.getLogger(__name__)

MOST_WAITING = 64
"""Norms that nobody took. Of more, the oldest goes."""


class GradientNorms:
    """Looks at the gradients before every so many steps of each optimizer, the first one included; where that would be
    too soon after the last look, before the next so many. A step in between costs a call and a comparison. Of gradients
    that are divided among ranks (FSDP) this rank's part counts.

    Not looked at: what a GradScaler left to a fused optimizer, where scaled gradients may be infinite on purpose.
    """

    def __init__(
        self, every: int, where: Callable[[], tuple[int, tuple[int, ...]]] = lambda: (0, ()), rest: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`where` says at which step the run is, and where in its data. `rest`: seconds that pass between two looks at
        least."""
        self.every = every
        """Counts from the next look on."""
        self._rest, self._now = rest, now
        self._where = where
        self._watched: WeakSet[Any] = WeakSet()
        self._waiting: list[tuple[torch.Tensor | float, Any, tuple[int, tuple[int, ...]]]] = []
        """Norms on their way to the host, each with the event that tells of its arrival (None: it is there)."""

    def watch(self, *things: Any) -> None:
        """Optimizers, or dicts of them."""
        for optimizer in optimizers(things):
            if optimizer not in self._watched:
                self._watched.add(optimizer)
                optimizer.register_step_pre_hook(self._hook())

    def take(self, *, wait: bool = False) -> list[Look]:
        """Those that have arrived since the last time, oldest first; with `wait` all of them, which may take until the
        device comes to an end."""
        arrived = []
        while self._waiting and (wait or self._waiting[0][1] is None or self._waiting[0][1].query()):
            norm, event, (step, place) = self._waiting.pop(0)
            if wait and event is not None:
                event.synchronize()
            arrived.append(Look(float(norm), step, place))
        return arrived

    def _hook(self) -> Callable[..., None]:
        left, due = 1, -math.inf

        def hook(optimizer: Any, *_: Any) -> None:
            nonlocal left, due
            left -= 1
            if not left:
                left = self.every
                if self.every == 1 or self._now() >= due:
                    due = self._now() + self._rest
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
        if not isinstance(norm, float) and norm.is_cuda:
            # Into pinned memory: the copy runs behind us, and the event tells when it is over.
            norm = norm.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((norm, event, self._where()))
        del self._waiting[:-MOST_WAITING]


def are_numbers(*things: Any) -> bool:
    """Whether all parameters of the optimizers among `things` are finite numbers, of divided ones this rank's part.
    Waits for the device."""
    for optimizer in optimizers(things):
        try:
            norm = _norm_of([parameter.detach() for parameter in _parameters(optimizer)])
        except (RuntimeError, NotImplementedError, TypeError):
            logger.debug("these parameters have no norm", exc_info=True)
            continue
        if norm is not None and not math.isfinite(norm):
            return False
    return True


def _norm(optimizer: Any) -> torch.Tensor | float | None:
    """The norm of all gradients together, where they are; None without any."""
    return _norm_of([parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None])


def _parameters(optimizer: Any) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _norm_of(tensors: Iterable[Any]) -> torch.Tensor | float | None:
    """A tensor where one would have to wait for a device."""
    found = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    if not found:
        return None
    # In half precision the norm itself would be infinite beyond 65,504.
    wide = torch.float32 if found[0].dtype is torch.float16 else None
    norms = torch._foreach_norm(found, 2, dtype=wide)
    devices = {norm.device for norm in norms}
    if len(devices) == 1 and norms[0].is_cpu:
        # A kernel that runs once in a while costs ten times what it does in a loop: none that can be left out.
        return math.hypot(*(norm.item() for norm in norms))
    with torch.no_grad():
        if len(devices) > 1:
            norms = tuple(norm.to(norms[0].device) for norm in norms)
        return torch.linalg.vector_norm(torch.stack(norms).to(torch.float32))
