"""What is saved: a model and its Adam state, of a given size in a given number of tensors, whose values are known."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Layers(nn.Module):
    """Square matrices, one after the other: each is a parameter."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(width, width)) for _ in range(count))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            images = images + 0.1 * torch.relu(images @ layer)
        return images


class Adder(torch.optim.AdamW):
    """A step adds one to every tensor, so that a copy that was torn, or taken too late, is found out."""

    entered = 0.0
    """When the last step began, its hooks done."""
    steps = 0
    """How many were made: what is added to every tensor by now."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.entered = time.perf_counter()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1)
                for tensor in self.state[parameter].values():
                    tensor.add_(1)
        self.steps += 1


class Subject:
    """`size_mib` of parameters and moments, in `tensors` of them; beside them every parameter has its counter of steps.

    Known values, if it is not `trained`: `expected` says what each tensor was when so many steps were made.
    """

    def __init__(self, size_mib: int, tensors: int, *, is_trained: bool) -> None:
        count = tensors // (1 + len(MOMENTS))
        self.model = Layers(round(((size_mib << 20) / 4 / (1 + len(MOMENTS)) / count) ** 0.5), count)
        self.names = [name for name, _ in self.model.named_parameters()]
        if is_trained:
            self._initialise()
            self.optimizer: torch.optim.AdamW = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        else:
            self.optimizer = Adder(self.model.parameters())
            self._make_state()
            for number, tensor in enumerate(self.tensors().values()):
                tensor.copy_(self._pattern(number, tensor))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The living ones, as most contenders want them: one flat dict."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            found[f"model.{name}"] = parameter.detach()
            for key, tensor in self.optimizer.state[parameter].items():
                found[f"{key}.{name}"] = tensor
        return found

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def differing(self, loaded: dict[str, torch.Tensor], steps: int) -> list[str]:
        """Names of tensors that are not, bit for bit, what they were after so many steps."""
        wrong = []
        for number, (name, tensor) in enumerate(self.tensors().items()):
            found = loaded.get(name)
            if found is None or not torch.equal(found.cpu(), self._pattern(number, tensor).add_(steps)):
                wrong.append(name)
        return wrong

    def _initialise(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.02, generator=generator)

    def _make_state(self) -> None:
        for parameter in self.model.parameters():
            moments = {key: torch.empty_like(parameter, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    @staticmethod
    def _pattern(number: int, like: torch.Tensor) -> torch.Tensor:
        """Whole numbers, small enough that adding to them is exact."""
        return torch.arange(like.numel(), dtype=torch.float32).remainder_(4093).add_(number % 251).view(like.shape)
