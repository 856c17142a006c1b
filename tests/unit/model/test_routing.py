"""Routing statistics, recording and replay on the real Megatron model, in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ModelConfig
from megatron_r1.model.presets import architecture
from megatron_r1.observe.names import check_names
from megatron_r1.parallel.world import World

VOCAB, EXPERTS, TOP_K, SCALE = 96, 8, 2, 2.5
RECOMPUTE = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def make_model(world: World, mtp: bool = False, precision: Any = "fp32", **fields: Any) -> Any:
    """Three layers, the last two with 8 experts; equal weights at every call, expert biases that matter."""
    from megatron_r1.model.build import build_model, unwrap

    config = ModelConfig(
        preset="tiny-moe", override={"num_hidden_layers": 3}, mtp=mtp, precision=precision, megatron=fields
    )
    model = unwrap(build_model(architecture(config, VOCAB), config, world)[0])
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=draw)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.1 * torch.randn(EXPERTS, generator=draw))
    return model


@contextmanager
def tapped(model: Any) -> Iterator[Any]:
    from megatron_r1.model.routing import RoutingTaps

    taps = RoutingTaps([model])
    try:
        yield taps
    finally:
        taps.remove()


@pytest.fixture(scope="module")
def model(world: World) -> Any:
    return make_model(world).train()


@pytest.fixture
def taps(model: Any) -> Iterator[Any]:
    model.train()
    model.zero_grad()
    for router in routers(model):
        router.local_tokens_per_expert.zero_()
    with tapped(model) as taps:
        yield taps


def routers(model: Any) -> list[Any]:
    return [layer.mlp.router for layer in model.decoder.layers[1:]]


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def forward(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    return model(tokens_BT, positions, None)


def valid(*shape: int) -> torch.Tensor:
    return torch.ones(math.prod(shape), dtype=torch.bool)


def other_experts(count: int, seed: int = 3) -> torch.Tensor:
    """[count, 2 layers, k] int16 of different experts a token."""
    draw = torch.rand(count, 2, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return draw.argsort(-1)[..., :TOP_K].short()


class Spy:
    """Input and output of one router's forward."""

    def __init__(self, router: Any) -> None:
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.handle = router.register_forward_hook(self.see)

    def see(self, _: Any, arguments: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.inputs.append(arguments[0].detach().flatten(0, 1).double())
        self.outputs.append(output)
        self.handle.remove()


def test_recorded_then_replayed_is_the_same_to_the_bit(model: Any, taps: Any) -> None:
    rows = tokens(3, 7)
    taps.begin(valid(3, 7), record=True)
    first = forward(model, rows)
    (record,) = taps.recorded()
    assert record.shape == (21, 2, TOP_K) and record.dtype == torch.int16 and taps.recorded() == []
    taps.reset()
    taps.begin(valid(3, 7), taps.all_layers(record, None))
    assert torch.equal(forward(model, rows), first)
    stats = taps.collect()
    assert stats.column("slots").tolist() == stats.column("covered").tolist() == [42, 42]
    assert stats.column("agreed").tolist() == [42, 42]


def test_bf16_replays_to_the_bit_too(world: World) -> None:
    model = make_model(world, precision="bf16").train()
    with tapped(model) as taps:
        taps.begin(valid(2, 7), record=True)
        first = forward(model, tokens(2, 7))
        taps.begin(valid(2, 7), taps.recorded()[0])
        assert first.dtype == torch.bfloat16 and torch.equal(forward(model, tokens(2, 7)), first)
        taps.begin(valid(2, 7), other_experts(14))
        assert (forward(model, tokens(2, 7)) - first).abs().max() > 1e-2


def test_the_record_is_the_best_experts_of_biased_scores(model: Any, taps: Any) -> None:
    router = routers(model)[1]
    spy = Spy(router)
    taps.begin(valid(2, 5), record=True)
    forward(model, tokens(2, 5))
    scores = (spy.inputs[0] @ router.weight.detach().double().T).sigmoid() + router.expert_bias.double()
    # tiny-moe: 2 groups, of which the one with the best two experts is taken
    best = scores.view(10, 2, 4).topk(2, dim=-1).values.sum(-1).argmax(-1)
    masked = scores.view(10, 2, 4).masked_fill(torch.arange(2)[None, :, None] != best[:, None, None], -9).view(10, 8)
    assert taps.recorded()[0][:, 1].tolist() == masked.topk(TOP_K, dim=-1).indices.tolist()


def test_replayed_experts_get_current_unbiased_scores_and_the_router_their_gradient(model: Any, taps: Any) -> None:
    rows, asked, router = tokens(2, 6), other_experts(12), routers(model)[0]
    own = forward(model, rows)
    taps.begin(valid(2, 6), asked)
    spy = Spy(router)
    changed = forward(model, rows)
    assert (changed - own).abs().max() > 1e-2
    probs, routing_map = spy.outputs[0]
    ids = asked[:, 0].long()
    assert torch.equal(routing_map, torch.zeros(12, EXPERTS, dtype=torch.bool).scatter(1, ids, True))

    weight = router.weight.detach().double().requires_grad_()
    scores = (spy.inputs[0] @ weight.T).sigmoid().gather(1, ids)
    expected = torch.zeros(12, EXPERTS, dtype=torch.float64).scatter(1, ids, SCALE * scores / scores.sum(1, True))
    assert torch.allclose(probs.double(), expected, atol=1e-6)
    cotangent = torch.randn(12, EXPERTS, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((probs * cotangent).sum(), router.weight)
    (wanted,) = torch.autograd.grad((expected * cotangent.double()).sum(), weight)
    assert wanted.abs().max() > 1e-2 and torch.allclose(found.double(), wanted, atol=1e-5)


def test_unknown_doubled_and_impossible_experts_fall_back_and_are_counted(model: Any, taps: Any) -> None:
    rows = tokens(1, 8)
    taps.begin(valid(8), record=True)
    forward(model, rows)
    own = taps.recorded()[0]
    asked = other_experts(8)
    asked[0:3] = -1  # unknown in both layers
    asked[3, 0] = torch.tensor([5, 5])
    asked[4, 0] = torch.tensor([2, EXPERTS])
    asked[5, 0, 1] = -1
    padding = valid(8)
    padding[[2, 7]] = False
    taps.reset()
    taps.begin(padding, asked, record=True)
    forward(model, rows)
    used = taps.recorded()[0][:, 0]
    assert used[:6].tolist() == own[:6, 0].tolist()
    assert used[6:].tolist() == asked[6:, 0].tolist()
    stats = taps.collect()
    assert stats.column("slots").tolist() == [12, 12]  # 6 valid tokens
    assert stats.column("covered").tolist() == [2, 8]  # token 6; tokens 3..6
    agreed = len(set(asked[6, 0].tolist()) & set(own[6, 0].tolist()))
    assert stats.column("agreed")[0] == agreed

    from megatron_r1.model.routing_stats import metrics

    found = metrics(stats)
    assert found["moe/replay_coverage"] == pytest.approx(10 / 24)
    assert found["moe/replay_agreement"] == pytest.approx(float(stats.column("agreed").sum()) / 10)


def test_padding_is_counted_nowhere(model: Any, taps: Any) -> None:
    long, short = tokens(1, 9, seed=1), tokens(1, 4, seed=2)
    for row in (long, short):
        taps.begin(None)
        forward(model, row)
    alone = taps.collect()
    counters = [router.local_tokens_per_expert.clone() for router in routers(model)]
    for router in routers(model):
        router.local_tokens_per_expert.zero_()
    padded = torch.zeros(2, 9, dtype=torch.int64)
    padded[0], padded[1, :4] = long[0], short[0]
    valid_BT = torch.ones(2, 9, dtype=torch.bool)
    valid_BT[1, 4:] = False

    from megatron_r1.model.routing import local_tokens

    taps.begin(local_tokens(valid_BT, 0, 1))
    forward(model, padded)
    together = taps.collect()
    assert together.load_KE.sum(1).tolist() == [13 * TOP_K] * 2
    assert torch.equal(together.load_KE, alone.load_KE)
    assert torch.allclose(together.table_KC, alone.table_KC, rtol=1e-6)
    for router, counter, load in zip(routers(model), counters, alone.load_KE, strict=True):
        assert torch.equal(router.local_tokens_per_expert, counter)
        assert torch.equal(counter.double(), load)


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_prediction_layers_count_their_padding_nowhere_and_replay_nothing(kind: str, world: World) -> None:
    from megatron_r1.model.gpt import TokenQuery

    model = make_model(world, mtp=True, **RECOMPUTE[kind]).train()
    router = model.mtp.layers[0].transformer_layer.mlp.router
    rows, where = tokens(1, 8), torch.arange(8)
    padding = valid(8)
    padding[5:] = False
    spy = Spy(router)
    with tapped(model) as taps:
        taps.begin(padding, other_experts(8), record=True)
        query = TokenQuery(index_M=where, targets_M=rows[0], ahead=((where, rows[0]),))
        model(rows, where[None], None, query=query).sum().backward()
        assert taps.layers == (0, 1) and taps.recorded()[0].shape == (8, 2, TOP_K)
        assert taps.collect().column("tokens").tolist() == [5, 5]
    _, routing_map = spy.outputs[0]
    assert torch.equal(router.local_tokens_per_expert, routing_map[:5].sum(0).float())
    assert routing_map[5:].any()


def two_micro_batches(model: Any) -> tuple[Any, list[torch.Tensor], dict[str, torch.Tensor]]:
    """Two forwards in flight before the first backward, as pipelining has them: stats, counters, gradients."""
    model.train()
    with tapped(model) as taps:
        losses = []
        for seed, length in ((4, 6), (5, 8)):
            padding = valid(length)
            padding[-seed // 2 :] = False
            asked = other_experts(length, seed)
            asked[1] = -1
            taps.begin(padding, asked)
            cotangent = torch.randn(1, length, VOCAB, generator=torch.Generator().manual_seed(seed))
            losses.append((forward(model, tokens(1, length, seed)) * cotangent).sum())
        for loss in losses:
            loss.backward()
        stats = taps.collect()
    counters = [router.local_tokens_per_expert for router in routers(model)]
    return stats, counters, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_repeats_the_replay_and_counts_once(kind: str, world: World) -> None:
    stats, counters, gradients = two_micro_batches(make_model(world))
    again, counters_again, gradients_again = two_micro_batches(make_model(world, **RECOMPUTE[kind]))
    assert torch.equal(stats.table_KC, again.table_KC)
    assert stats.column("tokens").tolist() == [9, 9] and stats.column("covered").tolist() == [14, 14]
    for counter, same, load in zip(counters, counters_again, stats.load_KE, strict=True):
        assert torch.equal(counter, same) and torch.equal(counter.double(), load)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_a_forward_whose_recomputation_never_comes_is_reported(world: World) -> None:
    model = make_model(world, **RECOMPUTE["full"]).train()
    with tapped(model) as taps:
        taps.begin(None)
        forward(model, tokens(1, 4))
        with pytest.raises(RuntimeError, match=r"layers \[2, 3\]"):
            taps.collect()
        assert taps.collect().column("tokens").tolist() == [0, 0]  # and forgotten


def test_only_begun_training_forwards_count(model: Any, taps: Any) -> None:
    taps.begin(None)
    forward(model, tokens(1, 5))
    forward(model, tokens(1, 6))  # not begun
    model.eval()
    taps.begin(None)
    forward(model, tokens(1, 7))  # log-probs, sampling
    assert taps.collect().column("tokens").tolist() == [5, 5]


def test_entropy_is_of_the_normalised_unbiased_scores(model: Any, taps: Any) -> None:
    router = routers(model)[0]
    spy = Spy(router)
    taps.begin(None)
    forward(model, tokens(2, 4))
    p = torch.nn.functional.normalize((spy.inputs[0] @ router.weight.detach().double().T).sigmoid(), p=1, dim=-1)
    assert taps.collect().column("entropy")[0] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)


@pytest.mark.parametrize("before_top_k", [False, True])
def test_entropy_and_replay_of_a_softmax_router(before_top_k: bool, world: World) -> None:
    model = make_model(world).train()
    for router in routers(model):
        router.score_function, router.expert_bias, router.enable_expert_bias = "softmax", None, False
        router.config.moe_router_pre_softmax = before_top_k
    with tapped(model) as taps:
        spy, asked = Spy(routers(model)[0]), other_experts(8)
        taps.begin(None, asked)
        forward(model, tokens(2, 4))
        log_p = (spy.inputs[0] @ routers(model)[0].weight.detach().double().T).log_softmax(-1)
        assert taps.collect().column("entropy")[0] == pytest.approx(float(-(log_p.exp() * log_p).sum()), rel=1e-5)
    ids = asked[:, 0].long()
    weights = log_p.exp().gather(1, ids)
    weights = SCALE * (weights if before_top_k else weights / weights.sum(1, keepdim=True))
    torch.testing.assert_close(spy.outputs[0][0].double().gather(1, ids), weights, rtol=1e-5, atol=1e-6)


def test_a_router_that_hides_its_choice_is_still_counted_and_recorded(model: Any, taps: Any) -> None:
    padding = valid(6)
    padding[4:] = False
    taps.begin(padding, record=True)
    forward(model, tokens(1, 6))
    shown, record = taps.collect(), taps.recorded()
    for router in routers(model):
        router.router_replay = None  # what a fused router amounts to: it never asks
    taps.begin(padding, record=True)
    forward(model, tokens(1, 6))
    hidden = taps.collect()
    assert record == [] and hidden.load_KE.tolist() == shown.load_KE.tolist()
    assert torch.allclose(hidden.table_KC, shown.table_KC, rtol=1e-6)


def set_on_the_built_config(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Give the next models fields that `[model.megatron]` refuses."""
    from megatron_r1.model import build

    stock = build.transformer_config

    def changed(*args: Any, **keywords: Any) -> Any:
        config = stock(*args, **keywords)
        for key, value in fields.items():
            setattr(config, key, value)
        return config

    monkeypatch.setattr(build, "transformer_config", changed)


@pytest.mark.parametrize("pad", [False, True])
def test_dropped_assignments_are_those_beyond_the_capacity(
    pad: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_on_the_built_config(monkeypatch, moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=pad)
    model = make_model(world).train()
    with tapped(model) as taps:
        taps.begin(valid(16), record=True)
        forward(model, tokens(1, 16))
        record = taps.recorded()[0]
        stats = taps.collect()
        for router in routers(model):
            router.router_replay = None
        taps.begin(None)
        forward(model, tokens(1, 16))
        hidden = taps.collect()  # only what reaches an expert is seen
    capacity = 16 * TOP_K // EXPERTS
    for layer in range(2):
        load = torch.bincount(record[:, layer].flatten().long(), minlength=EXPERTS)
        assert stats.load_KE[layer].tolist() == load.tolist()
        assert stats.column("dropped")[layer] == (load - capacity).clamp(min=0).sum() > 0
        assert hidden.column("dropped")[layer] == stats.column("dropped")[layer]
        assert hidden.load_KE[layer].tolist() == load.clamp(max=capacity).tolist()


def test_metrics_of_a_routing_by_hand() -> None:
    from megatron_r1.model.routing_stats import RoutingStats, count_routing, metrics

    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 2]])
    kept = torch.zeros(4, 4, dtype=torch.bool).scatter(1, chosen, True)
    kept[2, 0] = False  # beyond the capacity
    row = count_routing(
        torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]]),
        kept,
        chosen,
        valid_N=torch.tensor([True, True, True, False]),
        known_N=torch.tensor([True, False, True, True]),
        own_Nk=torch.tensor([[1, 0], [0, 2], [0, 3], [0, 1]]),
        top_k=2,
    )
    ln2 = math.log(2)
    assert row.tolist() == pytest.approx([3, 1, 3 * ln2, 6, 4, 3, 3, 2, 1, 0])
    even = torch.tensor([3.0, 0, 3 * math.log(4), 6, 6, 6, 1.5, 1.5, 1.5, 1.5], dtype=torch.float64)
    found = metrics(RoutingStats(layers=(3, 7), top_k=2, table_KC=torch.stack([row, even])))
    assert found == pytest.approx(
        {
            "moe/max_violation": 1.0,  # 3 / 1.5 - 1
            "moe/max_violation_mean": 0.5,
            "moe/load_min": 0.0,
            "moe/entropy": 1.5 * ln2,
            "moe/dropped": 1 / 12,
            "moe/replay_coverage": 10 / 12,
            "moe/replay_agreement": 9 / 10,
            "moe/max_violation/layer_3": 1.0,
            "moe/max_violation/layer_7": 0.0,
            "moe/load_min/layer_3": 0.0,
            "moe/load_min/layer_7": 1.0,
            "moe/entropy/layer_3": ln2,
            "moe/entropy/layer_7": 2 * ln2,
            "moe/dropped/layer_3": 1 / 6,
            "moe/dropped/layer_7": 0.0,
        }
    )
    check_names(list(found))
    with pytest.raises(ValueError, match=r"\['moe/entropy/layer_x', 'moe/replay_coverage/layer_3'\]"):
        check_names(["moe/entropy/layer_12", "moe/entropy/layer_x", "moe/replay_coverage/layer_3"])
    empty = RoutingStats(layers=(), top_k=2, table_KC=torch.zeros(0, 6, dtype=torch.float64))
    assert metrics(empty) == {}


def test_ranks_put_their_layers_in_place(world: World) -> None:
    from megatron_r1.model.routing_stats import RoutingStats, reduce

    table = torch.arange(14, dtype=torch.float64).view(1, 14)
    mine = RoutingStats(layers=(5,), top_k=2, table_KC=table)
    whole = reduce(mine, (3, 5, 7), world.device)
    assert whole.layers == (3, 5, 7) and whole.table_KC.tolist() == [[0.0] * 14, table[0].tolist(), [0.0] * 14]
    assert not reduce(mine, (3, 5, 7), world.device, counts=False).table_KC.any()


def test_names_of_layers_follow_the_decoder(taps: Any) -> None:
    assert taps.layers == (0, 1) and taps.model_layers == (1, 2)
    assert taps.collect().layers == (1, 2)


def test_local_order_is_positions_first_and_comes_back() -> None:
    from megatron_r1.model.routing import local_tokens, whole_rows

    grid = torch.arange(3 * 8 * 2).view(3, 8, 2)
    second = local_tokens(grid, 1, 2)
    assert second.tolist() == [grid[b, t].tolist() for t in range(4, 8) for b in range(3)]
    assert torch.equal(whole_rows(local_tokens(grid, 0, 1), 3, None), grid)
    with pytest.raises(ValueError, match="8 tokens do not divide over 3"):
        local_tokens(grid, 0, 3)


def test_what_cannot_work_is_refused(model: Any, taps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_r1.model.routing import RoutingTaps

    with pytest.raises(ValueError, match="already has taps"):
        RoutingTaps([model])
    with pytest.raises(ValueError, match=r"expected \[N, K, k\] = \(4, 2, 2\)"):
        taps.begin(valid(4), other_experts(4)[:, :1])
    with pytest.raises(ValueError, match="needs valid_N"):
        taps.begin(None, record=True)
    taps.begin(valid(5))
    with pytest.raises(ValueError, match=r"routes 4 tokens, but begin\(\) gave 5"):
        forward(model, tokens(1, 4))
    assert taps.given is None  # also after an error
    monkeypatch.setattr(model.config, "moe_router_fusion", True)
    with pytest.raises(UserError, match="moe_router_fusion"):
        taps.begin(valid(4), other_experts(4))


def test_megatrons_own_replay_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_r1.model.routing import RoutingTaps

    set_on_the_built_config(monkeypatch, moe_enable_routing_replay=True)
    model = make_model(world)
    with pytest.raises(UserError, match="moe_enable_routing_replay"):
        RoutingTaps([model])


def test_removed_taps_leave_nothing(model: Any) -> None:
    with tapped(model) as taps:
        pass
    taps.begin(None)
    model.train()
    forward(model, tokens(1, 4))
    assert taps.collect().column("tokens").tolist() == [0, 0]
    assert all(router.router_replay is None for router in routers(model))


def test_a_model_without_experts_has_nothing_to_tap(world: World) -> None:
    from megatron_r1.model.build import build_model
    from megatron_r1.model.routing import RoutingTaps
    from megatron_r1.model.routing_stats import metrics, reduce

    config = ModelConfig(preset="tiny-dense")
    dense = build_model(architecture(config, VOCAB), config, world)[0].train()
    taps = RoutingTaps([dense])
    taps.begin(None)
    forward(dense, tokens(1, 4))
    assert metrics(reduce(taps.collect(), taps.model_layers, torch.device("cpu"))) == {}
    with pytest.raises(UserError, match="no experts"):
        taps.begin(None, other_experts(4))
