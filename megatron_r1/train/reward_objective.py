"""What a step of reward-model training minimises: the mean pairwise loss over the pairs of the global batch.

N sequences of the micro-batch, P = N / 2 pairs, M sequences whose last token this rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_r1.algorithms.preference_loss import pairwise_loss
from megatron_r1.data.batching import MicroBatch
from megatron_r1.parallel.world import World
from megatron_r1.train.objectives import LossOutput
from megatron_r1.train.scoring import score_sequences


@dataclass(frozen=True, slots=True)
class RewardObjective:
    """Bradley-Terry over micro-batches of whole pairs: chosen, rejected, chosen, ... (`Batcher.together` = 2)."""

    pairs: int  # of the global batch, counted before the first forward
    tokens: int  # of all their sequences: what Megatron divides by
    world: World
    metric_names: tuple[str, ...] = ("loss", "correct", "chosen", "rejected")
    maximum_names: tuple[str, ...] = ()

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Values [M] of the sequences on the last stage."""
        return score_sequences(model, batch)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """A sum with the loss's gradient, and the metrics' sums over pairs; a tie counts as half in the right order."""
        held_N = batch.last_N >= 0
        mine_N = output.new_zeros(held_N.shape).masked_scatter(held_N, output)
        # Under context parallelism the last tokens of a pair may lie on two ranks; all of them get to know both values.
        values_P2 = self.world.sum_over_context(mine_N.detach()).view(-1, 2)
        losses_P, slopes_P2 = pairwise_loss(values_P2)
        margins_P = values_P2[:, 0] - values_P2[:, 1]
        sums = {
            "loss": losses_P.sum(),
            "correct": (0.5 * (1 + margins_P.sign())).sum(),
            "chosen": values_P2[:, 0].sum(),
            "rejected": values_P2[:, 1].sum(),
        }
        counted = float(self.world.context_rank == 0)  # each pair once
        total = (slopes_P2.flatten() * mine_N).sum() * (self.tokens / self.pairs)
        return total, batch.valid_BT.sum().to(torch.int), {name: value * counted for name, value in sums.items()}
