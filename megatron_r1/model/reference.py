"""The KL reference: an older copy of the policy, kept in host memory and swapped in for its log-prob pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch


class Reference:
    """A copy of the models' parameters and persistent buffers (the expert bias among them)."""

    def __init__(self, models: Sequence[torch.nn.Module], step: int) -> None:
        self.models = models
        self.weights = [tensor.detach().to("cpu", copy=True) for tensor in self._tensors()]
        self.step = step  # optimizer step at which the copy was taken

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for model in self.models for tensor in _named_tensors(model).values()]

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
            state[name] for model, state in zip(self.models, states, strict=True) for name in _named_tensors(model)
        ]
        for kept, value in zip(self.weights, values, strict=True):
            if kept.shape != value.shape:  # copy_ would broadcast
                raise ValueError(f"a reference weight of shape {tuple(value.shape)} for {tuple(kept.shape)}")
            kept.copy_(value)
        self.step = step

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the models hold the reference weights; afterwards their own, to the bit."""
        with torch.no_grad():
            tensors = self._tensors()
            policy = [tensor.clone() for tensor in tensors]
            for tensor, kept in zip(tensors, self.weights, strict=True):
                tensor.copy_(kept)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, own in zip(tensors, policy, strict=True):
                    tensor.copy_(own)


def _named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, not copied."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
