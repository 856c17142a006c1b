"""The KL reference: an older copy of the policy, swapped in for its log-prob pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch


class Reference:
    """A copy of the models' parameters and persistent buffers (the expert bias among them).

    memory "host": the copy waits in host memory; during its pass it is the policy's weights that wait there, so that
    the device never holds both. memory "device": a second copy on the device, and nothing is moved.
    """

    def __init__(
        self, models: Sequence[torch.nn.Module], step: int, memory: Literal["host", "device"] = "host"
    ) -> None:
        self.models, self.memory = models, memory
        self.weights = [self._copy(tensor) for tensor in self._tensors()]
        self.step = step  # optimizer step at which the copy was taken

    @property
    def bytes(self) -> int:
        """Memory of the copy on this rank."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        device = tensor.device if self.memory == "device" else torch.device("cpu")
        return tensor.detach().to(device, copy=True)

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for model in self.models for tensor in named_tensors(model).values()]

    @torch.no_grad()
    def replace(self, step: int) -> None:
        """The current policy becomes the reference (R1: every 400 steps)."""
        for kept, tensor in zip(self.weights, self._tensors(), strict=True):
            kept.copy_(tensor)
        self.step = step

    @torch.no_grad()
    def restore(self, states: Sequence[Mapping[str, torch.Tensor]], step: int) -> None:
        """These state dictionaries, one a model, become the reference; their order of keys is of no account."""
        values = [
            state[name] for model, state in zip(self.models, states, strict=True) for name in named_tensors(model)
        ]
        for kept, value in zip(self.weights, values, strict=True):
            if kept.shape != value.shape:  # copy_ would broadcast
                raise ValueError(f"a reference weight of shape {tuple(value.shape)} for {tuple(kept.shape)}")
            kept.copy_(value)
        self.step = step

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the models hold the reference weights; afterwards their own, to the bit."""
        tensors, own = self._tensors(), []
        with torch.no_grad():
            for tensor, kept in zip(tensors, self.weights, strict=True):
                if self.memory == "device":
                    own.append(tensor.data)
                    tensor.data = kept
                else:  # one tensor after the other: the device never holds a second copy
                    own.append(tensor.to("cpu", copy=True))
                    tensor.copy_(kept)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, mine in zip(tensors, own, strict=True):
                    if self.memory == "device":
                        tensor.data = mine
                    else:
                        tensor.copy_(mine)


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, not copied."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
