"""What a step of reward-model training minimises: the mean loss over the pairs, or the labelled answers, of the global
batch.

N sequences of the micro-batch, P = N / 2 pairs, M sequences whose last token this rank holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

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

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """From the sums over the global batch to what is written down."""
        means = {name: value / self.pairs for name, value in sums.items()}
        return {
            "loss/pairwise": means["loss"],
            "reward_model/accuracy": means["correct"],
            "reward_model/margin": means["chosen"] - means["rejected"],
            "reward_model/chosen": means["chosen"],
            "reward_model/rejected": means["rejected"],
        }


@dataclass(frozen=True, slots=True)
class PointwiseObjective:
    """Binary cross-entropy: sigmoid(value) is the chance that the answer is good (safe).

    DeepSeek-R1 trains its safety reward model "pointwise" on answers labelled safe or unsafe (arXiv 2501.12948, v2
    section 3.1.2) without spelling the loss out; this form is ours.
    """

    good: Sequence[bool]  # of every answer of the global batch, in the order in which they were batched
    tokens: int  # of all their sequences: what Megatron divides by
    metric_names: tuple[str, ...] = ("loss", "correct", "good", "bad")
    maximum_names: tuple[str, ...] = ()

    def forward(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Values [M] of the sequences on the last stage."""
        return score_sequences(model, batch)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> LossOutput:
        """A sum with the loss's gradient, and the metrics' sums over answers, each by the rank that holds its end."""
        labels_N = torch.tensor([self.good[i] for i in batch.sample_indices], dtype=torch.bool, device=output.device)
        good_M = labels_N[batch.last_N >= 0]
        loss = binary_cross_entropy_with_logits(output, good_M.to(output.dtype), reduction="sum")
        values_M = output.detach()
        # A value of 0 takes no side and counts half.
        right_M = 0.5 * (1 + torch.where(good_M, values_M, -values_M).sign())
        sums = {
            "loss": loss.detach(),
            "correct": right_M.sum(),
            "good": values_M[good_M].sum(),
            "bad": values_M[~good_M].sum(),
        }
        return loss * (self.tokens / len(self.good)), batch.valid_BT.sum().to(torch.int), sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """From the sums over the global batch to what is written down; no mean where there is no such answer."""
        counts = {"good": sum(self.good), "bad": len(self.good) - sum(self.good)}
        return {
            "loss/pointwise": sums["loss"] / len(self.good),
            "reward_model/accuracy": sums["correct"] / len(self.good),
            **{f"reward_model/{side}": sums[side] / count for side, count in counts.items() if count},
        }
