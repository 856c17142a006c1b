"""A model that is needed now and then, e.g. a distillation's teacher: its weights wait in host memory in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_r1.model.reference import named_tensors


class Parked:
    """The parameters and persistent buffers of models that nothing changes. Outside of `in_place` they are in host
    memory, and the models cannot run; a host whose memory is the device's moves nothing.

    models: on the device that they are to run on, their weights loaded.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device) -> None:
        self.device = device
        self._tensors = [tensor for model in models for tensor in named_tensors(model).values()]
        self._host = [tensor.detach().to("cpu") for tensor in self._tensors]
        self._point_at(self._host)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the weights are on the device, beside whatever else is there."""
        self._point_at([tensor.to(self.device) for tensor in self._host])
        try:
            yield
        finally:
            self._point_at(self._host)

    def _point_at(self, values: Sequence[torch.Tensor]) -> None:
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.data = value
