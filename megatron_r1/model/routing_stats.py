"""How evenly experts are used: sums that `model/routing.py` gathers at the routers, and the metrics made of them.

Only training forwards are counted, each token once a layer, padding never. Load counts what the router chose; what a
capacity factor then drops is counted apart.

Letters: N tokens, K MoE layers, k experts a token, E experts, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

COLUMNS = ("tokens", "dropped", "entropy", "slots", "covered", "agreed")
"""Columns of the table before the E columns of the load.

tokens: valid tokens; dropped: assignments beyond the capacity; entropy: sum over tokens of the entropy, in nats, of
the gate scores normalised over all experts (without the expert bias); slots: assignments that replay was asked for;
covered: those of them that were known; agreed: those of the covered that the router would have chosen itself.
"""


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Sums, one row a MoE layer: of this rank's layers and tokens, or after `reduce` of all."""

    layers: tuple[int, ...]  # decoder layer of each row, counted from 0 as in `model.layers.N`
    top_k: int
    table_KC: Tensor  # float64 on the CPU: COLUMNS, then tokens per expert

    def column(self, name: str) -> Tensor:
        """[K] of one of COLUMNS."""
        return self.table_KC[:, COLUMNS.index(name)]

    @property
    def load_KE(self) -> Tensor:
        """Valid tokens that chose each expert."""
        return self.table_KC[:, len(COLUMNS) :]


def empty_sums(experts: int, device: torch.device | str = "cpu") -> Tensor:
    """[C] float64 zeros: one row of the table. (float64 counts exactly up to 2**53.)"""
    return torch.zeros(len(COLUMNS) + experts, dtype=torch.float64, device=device)


def count_routing(
    gate_NE: Tensor,
    kept_NE: Tensor,
    chosen_Nk: Tensor | None,
    *,
    valid_N: Tensor | None,
    known_N: Tensor | None,
    own_Nk: Tensor | None,
    top_k: int,
) -> Tensor:
    """The sums [C] of one forward through one router.

    Args:
        gate_NE: float32 gate scores that add up to 1 over the experts.
        kept_NE: bool, assignments that reach their expert.
        chosen_Nk: ids in effect; None where the router does not show them (then those kept count as chosen).
        valid_N: bool, False at padding; None: no padding.
        known_N: bool, where ids were replayed; None: no replay.
        own_Nk: ids that the router would have taken.
        top_k: k.
    """
    valid_N = torch.ones_like(kept_NE[:, 0]) if valid_N is None else valid_N
    chosen_NE = _one_hot(chosen_Nk, kept_NE) if chosen_Nk is not None else kept_NE
    tokens = valid_N.sum()
    kept = (kept_NE & chosen_NE & valid_N[:, None]).sum()
    zero = torch.zeros_like(tokens)
    slots = covered = agreed = zero
    if known_N is not None and own_Nk is not None:
        replayed_N = known_N & valid_N
        slots, covered = tokens * top_k, replayed_N.sum() * top_k
        agreed = (chosen_NE & _one_hot(own_Nk, kept_NE) & replayed_N[:, None]).sum()
    entropy = torch.where(valid_N, torch.special.entr(gate_NE).sum(-1), 0.0).double().sum()
    head = torch.stack([x.double() for x in (tokens, tokens * top_k - kept, entropy, slots, covered, agreed)])
    return torch.cat([head, (chosen_NE & valid_N[:, None]).sum(0).double()])


def reduce(
    stats: RoutingStats, model_layers: tuple[int, ...], device: torch.device, counts: bool = True
) -> RoutingStats:
    """The sums of all ranks, with the layers of all pipeline stages, on every rank. Collective over the world.

    Args:
        stats: this rank's.
        model_layers: decoder layers with experts of the whole model (`RoutingTaps.model_layers`).
        device: where the collective runs.
        counts: whether this rank's tokens are its own. Data, context and sequence-parallel ranks each route other
            tokens; tensor-parallel ranks without sequence parallelism route the same ones, and all but the first of
            them pass False.
    """
    whole = torch.zeros(len(model_layers), stats.table_KC.shape[1], dtype=torch.float64, device=device)
    if counts:
        for layer, row in zip(stats.layers, stats.table_KC, strict=True):
            whole[model_layers.index(layer)] = row.to(device)
    if dist.is_initialized():
        dist.all_reduce(whole)
    return replace(stats, layers=model_layers, table_KC=whole.cpu())


def metrics(stats: RoutingStats) -> dict[str, float]:
    """Metrics of reduced sums, by the names of `observe/names.py`; empty without experts or tokens.

    The maximal violation of a layer is max_e load_e / mean_e load_e - 1 (MaxVio of arXiv 2408.15664).
    """
    if not stats.layers or not bool((stats.column("tokens") > 0).all()):
        return {}
    mean_K = stats.load_KE.mean(1)
    violation_K = stats.load_KE.amax(1) / mean_K - 1
    least_K = stats.load_KE.amin(1) / mean_K
    entropy_K = stats.column("entropy") / stats.column("tokens")
    dropped_K = stats.column("dropped") / (stats.column("tokens") * stats.top_k)
    found = {
        "moe/max_violation": violation_K.max(),
        "moe/max_violation_mean": violation_K.mean(),
        "moe/load_min": least_K.min(),
        "moe/entropy": entropy_K.mean(),
        "moe/dropped": dropped_K.mean(),
    }
    slots, covered = stats.column("slots").sum(), stats.column("covered").sum()
    if slots:
        found["moe/replay_coverage"] = covered / slots
    if covered:
        found["moe/replay_agreement"] = stats.column("agreed").sum() / covered
    layers = {
        "moe/max_violation": violation_K,
        "moe/load_min": least_K,
        "moe/entropy": entropy_K,
        "moe/dropped": dropped_K,
    }
    for name, values_K in layers.items():
        found.update({f"{name}/layer_{layer}": x for layer, x in zip(stats.layers, values_K, strict=True)})
    return {name: float(value) for name, value in found.items()}


def _one_hot(ids_Nk: Tensor, like_NE: Tensor) -> Tensor:
    return torch.zeros_like(like_NE, dtype=torch.bool).scatter(1, ids_Nk, True)
