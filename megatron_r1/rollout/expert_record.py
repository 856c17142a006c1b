"""Which experts the in-process engine used for every token, so that training can replay them.

The engine announces each forward of a decoding batch to a recorder (the trainer's `RoutingTaps`) and hands the rows'
choices to their completions at the end.

Letters: B rows of the forward, T its tokens a row, K MoE layers (L of this pipeline stage), k experts a token.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Recorder(Protocol):
    """What records routers' choices: `RoutingTaps`."""

    def begin(self, valid_N: Tensor | None, experts_NKk: Tensor | None = None, record: bool = False) -> None:
        """Announce the next forward of a model chunk."""
        ...

    def recorded(self) -> list[Tensor]:
        """int16 [N, L, k] of each forward, N in the order position by position."""
        ...

    def all_layers(self, experts_NLk: Tensor, pipeline_group: Any | None) -> Tensor:
        """[N, L, k] of this stage -> [N, K, k] of all. Collective."""
        ...


class ExpertRecord:
    """The choices of one decoding batch, by row and position."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self.recorder, self.device = recorder, device
        self._experts: np.ndarray | None = None  # int16 [rows, room, L, k]; -1: never went through the model

    def announce(self, rows: int, length: int) -> None:
        """Before each chunk's forward of [rows, length] tokens."""
        self.recorder.begin(torch.ones(rows * length, dtype=torch.bool, device=self.device), record=True)

    def take(self, position: int, alive: np.ndarray) -> None:
        """After a forward through all chunks: the tokens from `position` on, of the batch's rows `alive`."""
        (chosen_NLk,) = self.recorder.recorded()
        chosen = chosen_NLk.unflatten(0, (-1, len(alive))).transpose(0, 1).cpu().numpy()  # [B, T, L, k]
        end = position + chosen.shape[1]
        if self._experts is None:  # the first forward holds all rows
            self._experts = np.full((len(alive), 2 * end, *chosen.shape[2:]), -1, dtype=np.int16)
        if end > self._experts.shape[1]:
            self._experts = np.concatenate([self._experts, np.full_like(self._experts, -1)], axis=1)
        self._experts[alive, position:end] = chosen

    def of_row(self, row: int, length: int, pipeline_group: Any) -> np.ndarray:
        """int16 [length, K, k] of a row of `length` tokens; -1 at the last one, which no token was sampled after.

        Collective over the pipeline stages.
        """
        assert self._experts is not None, "no forward was taken"
        mine = torch.from_numpy(self._experts[row, : length - 1]).to(self.device)
        whole = self.recorder.all_layers(mine, pipeline_group).cpu().numpy()
        return np.concatenate([whole, np.full_like(whole[:1], -1)])
