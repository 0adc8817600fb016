"""Copying while the next forward and backward run: what may be copied so late, and when that must be over.

Parameters and the tensors of their optimizer change in `optimizer.step`, and nowhere else if all is as usual. They may
be copied after a save returned, as long as no step begins before the copy has ended. Everything else is changed by the
next forward pass, or by whoever owns it, and is copied at once.

What is unusual is refused where it can be seen beforehand. Where it cannot, torch's count of changes of each tensor
tells afterwards, and that save is thrown away. Two things are not seen: writes through `tensor.data`, and steps of an
optimizer that is not in the state, of parameters that also belong to one that is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim import LBFGS, Optimizer

from orchestrator.checkpoints.state import TrainState


class Refused(Exception):
    """This state cannot be copied late."""


class Overlap:
    """Which tensors of a state may be copied late, and the fence before the steps that would change them.

    `tell(event, why)` hears once why there is no overlap any more. Not for several threads, but the fence is: any
    thread may step.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self._tell = tell
        self._state: TrainState | None = None
        self._is_over = False
        self._hooks: list[Any] = []
        self._thread: threading.Thread | None = None
        self._waited = 0.0
        self._seen: tuple[list[int], list[int]] | None = None
        """Addresses of the tensors that were asked about last, and the answer."""

    def attach(self, state: TrainState) -> None:
        """Sets the fence before the steps of this state's optimizers."""
        if state is self._state or self._is_over:
            return
        self.settle()  # what is being copied is the earlier state's, whose fence goes now
        self._state, self._seen = state, None
        self._remove_hooks()
        try:
            self._hooks = [
                optimizer.register_step_pre_hook(self._before_step) for optimizer in _optimizers(state.parts)
            ]
        except Refused as error:
            self.stop("overlap-refused", str(error))

    def late(self, tensors: Sequence[torch.Tensor], may: Sequence[bool]) -> list[int]:
        """Places in `tensors` of those that may be copied late. `may` says which nothing but an optimizer changes, as
        far as the state's make-up tells."""
        if self._state is None or self._is_over:
            return []
        addresses = [tensor.data_ptr() for tensor in tensors]
        if self._seen is None or self._seen[0] != addresses:
            try:
                self._seen = addresses, _late(self._state, tensors, may)
            except Refused as error:
                self.stop("overlap-refused", str(error))
                return []
        return self._seen[1]

    def start(self, copy: Callable[[], None]) -> None:
        """Runs it in a thread, which also ends if this program does: no step is made before."""
        self.settle()
        self._thread = threading.Thread(target=copy, name="staging copy")
        self._thread.start()

    def settle(self) -> None:
        """Returns when nothing is being copied."""
        thread = self._thread
        if thread is not None:
            thread.join()
            self._thread = None

    def stalled(self) -> float:
        """Seconds that steps waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def stop(self, event: str, why: str) -> None:
        """From now on nothing is copied late."""
        if not self._is_over:
            self.close()
            self._tell(event, why)

    def close(self) -> None:
        self.settle()
        self._is_over, self._state, self._seen = True, None, None
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._thread is not None:
            begun = time.perf_counter()
            self.settle()
            self._waited += time.perf_counter() - begun


def changed(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> int:
    """How many of the tensors were changed since `versions` were taken, as far as torch counts it."""
    return sum(now != before for now, before in zip(versions_of(tensors), versions, strict=True))


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _late(state: TrainState, tensors: Sequence[torch.Tensor], may: Sequence[bool]) -> list[int]:
    """Raises Refused."""
    optimizers = _optimizers(state.parts)
    for name, module in _modules(state.parts.get("model")):
        _check_module(name, module)
    for optimizer in optimizers:
        for parameter in _parameters(optimizer):
            _check_parameter(parameter)
    owned = {_local(tensor).data_ptr() for optimizer in optimizers for tensor in _owned(optimizer)}
    # Those without a dimension are counters, mostly; to copy them at once costs nothing.
    late = [
        place
        for place, (tensor, is_usual) in enumerate(zip(tensors, may, strict=True))
        if is_usual and tensor.dim() and tensor.nbytes and not tensor.is_inference() and tensor.data_ptr() in owned
    ]
    storages = {tensors[place].untyped_storage().data_ptr() for place in late}
    at_once = set(range(len(tensors))).difference(late)
    if any(tensors[place].nbytes and tensors[place].untyped_storage().data_ptr() in storages for place in at_once):
        raise Refused("something else in the state shares memory with a parameter, and may change when it does not")
    return late


def _optimizers(parts: Mapping[str, Any]) -> list[Optimizer]:
    """Raises Refused."""
    found = list(_leaves(parts.get("optimizer")))
    if not found:
        raise Refused("there is no optimizer in the state, so nobody says when its tensors change")
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise Refused(f"{type(optimizer).__qualname__} is no torch.optim.Optimizer: its steps cannot be held up")
        if isinstance(optimizer, LBFGS):
            raise Refused("LBFGS computes inside its step, so there is nothing that a copy could overlap with")
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif value is not None:
        yield value


def _modules(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    for each in _leaves(model):
        if isinstance(each, torch.nn.Module):
            yield from each.named_modules()


def _check_module(name: str, module: torch.nn.Module) -> None:
    hooks = [*module._forward_pre_hooks.values()]
    if parametrize.is_parametrized(module) or any(isinstance(hook, SpectralNorm | WeightNorm) for hook in hooks):
        raise Refused(f"the parameters of {name or 'the model'} are computed from others in its forward pass")


def _check_parameter(parameter: torch.Tensor) -> None:
    # torch has no public word for either.
    if getattr(parameter, "_post_accumulate_grad_hooks", None) or hasattr(parameter, "_in_backward_optimizers"):
        raise Refused("parameters have hooks that run in the backward pass, where an optimizer may step")


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _owned(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """What its step changes."""
    yield from _parameters(optimizer)
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is here."""
    return getattr(tensor, "_local_tensor", tensor)
