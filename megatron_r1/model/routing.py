"""Routing of mixture-of-experts layers made visible: load statistics, recording and replay of expert choices.

`RoutingTaps` listens at every router of this rank's model chunks. An objective calls `begin` before each forward of a
chunk; the trainer calls `collect` once a step and `routing_stats.reduce` makes the numbers of the whole model of it.

* Padding is kept out of the statistics and out of the counters by which Megatron updates the expert bias. (Megatron
  0.16.1's own `padding_mask` is of no use: with an expert bias it has a shape error, and only the first pipeline stage
  cuts it for sequence parallelism.)
* Replay (arXiv 2507.18071 calls it routing replay, arXiv 2510.11370 rollout routing replay): training uses the
  experts that the old policy, or the engine that sampled, chose. The gate weights are still computed from the current
  scores, at the replayed experts, so the router learns. A token whose experts are not known takes the router's own
  choice and lowers `moe/replay_coverage`.

Letters: B rows, T tokens of a row, N tokens that this rank's routers see, K MoE layers, k experts a token, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_r1.config.errors import UserError
from megatron_r1.model.build import unwrap
from megatron_r1.model.routing_stats import RoutingStats, count_routing, empty_sums


@dataclass(frozen=True, slots=True)
class _Given:
    """What `begin` says of one micro-batch."""

    valid_N: Tensor | None
    experts_NKk: Tensor | None
    record: bool


class RoutingTaps:
    """All routers of this rank's chunks. A model without experts has none, and then nothing here does anything."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        """Attach to the routers of `models` (wrapped or not), until `remove`.

        Raises UserError where Megatron's own replay is switched on, ValueError where other taps are attached.
        """
        chunks = [unwrap(model) for model in models]
        config = chunks[0].config
        self.model_layers = moe_layers(config)
        """Decoder layers with experts of the whole model, counted from 0; the MoE layer index is the place here."""
        self._taps = [_Tap(self, router, layer) for chunk in chunks for router, layer in _routers(chunk)]
        self._decoder_taps = sorted((tap for tap in self._taps if tap.layer is not None), key=lambda tap: tap.place)
        self.layers = tuple(tap.place for tap in self._decoder_taps)
        """MoE layer indices of this rank, all chunks together, ascending."""
        self.experts, self.top_k = config.num_moe_experts or 0, config.moe_router_topk
        self._given: _Given | None = None
        self._recorded_sizes: list[int] = []
        self._config = config
        self._handles = [
            chunk.register_forward_hook(self._ender(first=i == 0), always_call=True) for i, chunk in enumerate(chunks)
        ]

    def begin(self, valid_N: Tensor | None, experts_NKk: Tensor | None = None, record: bool = False) -> None:
        """Announce the micro-batch of the next forward through a chunk; that forward ends it.

        Without `begin` a forward is Megatron's own and counts nothing. Recomputation in the backward pass finds its
        micro-batch again by itself.

        Args:
            valid_N: bool, in the order of `local_tokens`; None: no padding.
            experts_NKk: int16 of all MoE layers of the model, the experts to replay. A token of a layer with an id
                outside of 0..E-1, or with one twice, is not known: the router chooses. None: no replay.
            record: keep the choices for `recorded`; needs valid_N.

        Raises:
            UserError: replay with a router that cannot (`check_replayable`).
            ValueError: tensors of the wrong shape.
        """
        if record and valid_N is None:
            raise ValueError("recording needs valid_N: a rank without experts learns the number of tokens from it")
        if experts_NKk is not None:
            check_replayable(self._config)
            tokens = experts_NKk.shape[0] if valid_N is None else len(valid_N)
            expected = (tokens, len(self.model_layers), self.top_k)
            if tuple(experts_NKk.shape) != expected:
                raise ValueError(f"experts of shape {tuple(experts_NKk.shape)}, expected [N, K, k] = {expected}")
        self._given = _Given(valid_N, experts_NKk, record)

    def collect(self) -> RoutingStats:
        """This rank's sums over the training forwards since the last call, [len(layers)] rows; then starts anew.

        Raises RuntimeError when a recomputation is still due: a forward in training mode had no backward pass.
        """
        due = [tap.router.layer_number for tap in self._taps if tap.due]
        if due:
            self.reset()
            raise RuntimeError(f"layers {due} await a recomputation that never came; was eval() forgotten?")
        sums = [tap.sums for tap in self._decoder_taps]
        table = torch.stack(sums).cpu() if sums else empty_sums(self.experts)[None][:0]
        stats = RoutingStats(layers=tuple(self.model_layers[i] for i in self.layers), top_k=self.top_k, table_KC=table)
        self.reset()
        return stats

    def reset(self) -> None:
        """Forget statistics, records and recomputations that are due (after a step that failed)."""
        self._given = None
        self._recorded_sizes = []
        for tap in self._taps:
            tap.reset()

    def recorded(self) -> list[Tensor]:
        """The choices of each micro-batch begun with `record`, in order: int16 [N, len(layers), k]; then forgets them.

        Padding has choices too. The order of a token's k experts is the router's, best first.
        """
        sizes, self._recorded_sizes = self._recorded_sizes, []
        kept = [tap.take_records() for tap in self._decoder_taps]
        if any(len(records) != len(sizes) for records in kept):
            raise RuntimeError(f"{len(sizes)} micro-batches begun, but {[len(r) for r in kept]} seen by the routers")
        device = self._given_device()
        return [
            torch.stack([records[i] for records in kept], dim=1)
            if kept
            else torch.empty(size, 0, self.top_k, dtype=torch.int16, device=device)
            for i, size in enumerate(sizes)
        ]

    def all_layers(self, experts_NLk: Tensor, pipeline_group: Any | None) -> Tensor:
        """This rank's layers [N, len(layers), k] -> those of all pipeline stages, int16 [N, K, k]. Collective."""
        shape = (experts_NLk.shape[0], len(self.model_layers), self.top_k)
        whole = experts_NLk.new_full(shape, -1, dtype=torch.int32)  # no backend reduces int16
        whole[:, list(self.layers)] = experts_NLk.int()
        if pipeline_group is not None and pipeline_group.size() > 1:
            dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=pipeline_group)
        return whole.short()

    def remove(self) -> None:
        """Leave the routers as they were."""
        for handle in self._handles:
            handle.remove()
        for tap in self._taps:
            tap.remove()

    @property
    def given(self) -> _Given | None:
        """The micro-batch whose forward runs now."""
        return self._given

    def _ender(self, first: bool) -> Callable[..., None]:
        def end(*_: Any) -> None:
            if first and self._given is not None and self._given.record and self._given.valid_N is not None:
                self._recorded_sizes.append(len(self._given.valid_N))
            self._given = None

        return end

    def _given_device(self) -> torch.device:
        return self._taps[0].router.weight.device if self._taps else torch.device("cpu")


class _Tap:
    """One router. It stands in for Megatron's RouterReplay, and its hooks see what goes in and comes out."""

    def __init__(self, owner: RoutingTaps, router: TopKRouter, layer: int | None) -> None:
        if isinstance(router.router_replay, _Tap):
            raise ValueError(f"the router of layer {router.layer_number} already has taps; remove those first")
        if router.router_replay is not None:
            raise UserError(
                "[model.megatron] moe_enable_routing_replay: replay is done by this project's own taps; "
                "leave that field out"
            )
        self.owner, self.router, self.layer = owner, router, layer  # layer None: a multi-token-prediction layer
        self.recomputes = router.config.recompute_granularity is not None
        self.due: deque[_Given | None] = deque()
        self.reset()
        router.router_replay = self
        self.handles = [router.register_forward_pre_hook(self.before), router.register_forward_hook(self.after)]

    @property
    def place(self) -> int:
        """MoE layer index of a decoder layer."""
        assert self.layer is not None
        return self.layer

    def reset(self) -> None:
        self.due.clear()
        self.records: list[Tensor] = []
        self.sums = empty_sums(self.router.config.num_moe_experts, self.router.weight.device)
        self._forget()

    def _forget(self) -> None:
        self.now: _Given | None = None
        self.scores_NE: Tensor | None = None
        self.own_Nk: Tensor | None = None
        self.chosen_Nk: Tensor | None = None
        self.known_N: Tensor | None = None

    def remove(self) -> None:
        self.router.router_replay = None
        for handle in self.handles:
            handle.remove()

    def take_records(self) -> list[Tensor]:
        records, self.records = self.records, []
        return records

    def before(self, router: TopKRouter, arguments: tuple[Any, ...]) -> None:
        """Find the micro-batch: a recomputed layer runs once without gradient and again in the backward pass, when
        other micro-batches have begun; both passes come in the same order.
        """
        self._forget()
        self.now, self.again, self.with_grad = self.owner.given, False, torch.is_grad_enabled()
        if self.recomputes and router.training:
            if not self.with_grad:
                self.due.append(self.now)
            elif self.due:
                self.now, self.again = self.due.popleft(), True
        tokens = arguments[0].shape[:-1].numel()
        for given in () if self.now is None else (self.now.valid_N, self.now.experts_NKk):
            if given is not None and len(given) != tokens:
                raise ValueError(f"layer {router.layer_number} routes {tokens} tokens, but begin() gave {len(given)}")

    def get_replay_topk(
        self,
        scores_NE: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """(scores, ids) [N, k] of the replayed experts where they are known, of the best elsewhere."""
        values_Nk, ids_Nk = default_compute_topk(scores_NE, topk, num_groups, group_topk)
        self.scores_NE, self.own_Nk, self.chosen_Nk = scores_NE.detach(), ids_Nk, ids_Nk
        if self.now is None or self.now.experts_NKk is None or self.layer is None:
            return values_Nk, ids_Nk
        asked_Nk = self.now.experts_NKk[:, self.layer].long()
        self.known_N = _usable(asked_Nk, scores_NE.shape[1])
        self.chosen_Nk = torch.where(self.known_N[:, None], asked_Nk, ids_Nk)
        return scores_NE.gather(1, self.chosen_Nk), self.chosen_Nk

    @torch.no_grad()
    def after(self, router: TopKRouter, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Take the padding out of the bias counters; once a token, record and count."""
        if self.now is not None:
            self._take(self.now, router, arguments[0], *output)
        self._forget()

    def _take(self, now: _Given, router: TopKRouter, hidden: Tensor, probs_NE: Tensor, map_NE: Tensor) -> None:
        if now.valid_N is not None and router.enable_expert_bias and self.with_grad:
            # Megatron has just added all of map_NE, under the same condition.
            router.local_tokens_per_expert -= (map_NE & ~now.valid_N[:, None]).sum(0)
        if self.layer is None or self.again:
            return
        if now.record:
            chosen_Nk = self.chosen_Nk if self.chosen_Nk is not None else _from_map(probs_NE, map_NE, router.topk)
            self.records.append(chosen_Nk.short())
        if router.training:
            self.sums += count_routing(
                self._gate_scores(router, hidden),
                map_NE & (probs_NE > 0),  # padding to capacity maps experts that nobody chose
                self.chosen_Nk,
                valid_N=now.valid_N,
                known_N=self.known_N,
                own_Nk=self.own_Nk,
                top_k=router.topk,
            )

    def _gate_scores(self, router: TopKRouter, hidden: Tensor) -> Tensor:
        """[N, E] float32 that add up to 1: the distribution of which the router takes the top."""
        scores_NE = self.scores_NE
        sigmoid = router.score_function == "sigmoid"
        if scores_NE is None:  # a fused router does not show them
            logits_NE = router.gating(hidden).reshape(-1, router.config.num_moe_experts).float()
            scores_NE = logits_NE.sigmoid() if sigmoid else logits_NE
        elif sigmoid and router.expert_bias is not None:
            scores_NE = scores_NE - router.expert_bias
        scores_NE = scores_NE.float()
        if sigmoid:
            return scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        if router.config.moe_router_pre_softmax and self.scores_NE is not None:
            return scores_NE
        return scores_NE.softmax(-1)


def moe_layers(config: Any) -> tuple[int, ...]:
    """Decoder layers, counted from 0, that a Megatron configuration gives experts to."""
    if not config.num_moe_experts:
        return ()
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(i % pattern == 0) for i in range(config.num_layers)]
    return tuple(i for i, experts in enumerate(pattern) if experts)


def check_replayable(config: Any) -> None:
    """Raise UserError when this model's routers cannot take experts from outside, or it has no routers."""
    if not config.num_moe_experts:
        raise UserError("routing replay: this model has no experts; switch replay off")
    if config.moe_router_fusion:
        raise UserError(
            "[model.megatron] moe_router_fusion = true: the fused router chooses its experts inside one kernel, and "
            "recorded ones cannot be put in; set it to false to replay routing"
        )
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise UserError(
            "[model.megatron] moe_router_load_balancing_type = sinkhorn: such a router does not choose the top k "
            "scores, and recorded experts cannot be put in; use 'none' with the expert bias to replay routing"
        )


def local_tokens(values_BT: Tensor, tensor_rank: int, tensor_size: int) -> Tensor:
    """[B, T, ...] of this context rank -> [N, ...] in the order in which this rank's routers see tokens.

    Positions first, then rows. tensor_size: ranks that split the positions by sequence parallelism, 1 without it; T
    must divide by it. N = B * T / tensor_size.
    """
    length = values_BT.shape[1]
    if length % tensor_size:
        raise ValueError(f"rows of {length} tokens do not divide over {tensor_size} sequence-parallel ranks")
    share = length // tensor_size
    return values_BT[:, tensor_rank * share : (tensor_rank + 1) * share].transpose(0, 1).flatten(0, 1)


def whole_rows(values_N: Tensor, rows: int, group: Any | None) -> Tensor:
    """Inverse of `local_tokens` on every rank of `group`: [N, ...] -> [B, T, ...]. Collective.

    group: the tensor-parallel ranks under sequence parallelism, None without it.
    """
    if group is not None and group.size() > 1:
        raw = values_N.contiguous().flatten().view(torch.uint8)  # as bytes: no backend gathers int16
        gathered = raw.new_empty(group.size() * raw.numel())
        dist.all_gather_into_tensor(gathered, raw, group=group)
        values_N = gathered.view(values_N.dtype).reshape(-1, *values_N.shape[1:])
    return values_N.unflatten(0, (-1, rows)).transpose(0, 1).contiguous()


def _routers(chunk: torch.nn.Module) -> list[tuple[TopKRouter, int | None]]:
    """Routers of a chunk with their MoE layer index, None in multi-token-prediction layers."""
    layers = moe_layers(chunk.config)
    return [
        (module, None if name.startswith("mtp.") else layers.index(module.layer_number - 1))
        for name, module in chunk.named_modules()
        if isinstance(module, TopKRouter)
    ]


def _usable(ids_Nk: Tensor, experts: int) -> Tensor:
    """[N] bool: k different ids of experts. Others would be scattered out of bounds, or weigh an expert twice."""
    ordered = ids_Nk.sort(dim=1).values
    in_range = (ordered[:, 0] >= 0) & (ordered[:, -1] < experts)
    return in_range & (ordered[:, 1:] != ordered[:, :-1]).all(dim=1)


def _from_map(probs_NE: Tensor, map_NE: Tensor, top_k: int) -> Tensor:
    """[N, k] ids that a router's output shows, best first; -1 where an assignment was dropped."""
    ids_Nk = probs_NE.masked_fill(~map_NE, -1.0).topk(top_k, dim=1).indices
    return torch.where(map_NE.gather(1, ids_Nk), ids_Nk, -1)
