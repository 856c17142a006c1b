"""What Megatron-Core gets silently wrong in several processes, and what this project does about it, by value.

The functions without `test_` run in the worlds; each returns plain tensors and lists.
"""

from __future__ import annotations

import hashlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.model.log_prob_head import token_log_probs
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.context import zigzag
from megatron_r1.parallel.world import World
from tests.dist.harness import run_layouts, run_world
from tests.reference.attention import slow_attention
from tests.reference.log_probs import slow_log_probs

ONE = ParallelConfig(data=1)
CP2 = ParallelConfig(context=2, data=1)
TP2 = ParallelConfig(tensor=2, data=1)
EP2 = ParallelConfig(expert=2, data=2)
PP2_EP2 = ParallelConfig(pipeline=2, expert=2, data=2)
# Layers with experts on either of two stages.
MODEL = ModelConfig(preset="tiny-moe", override={"num_hidden_layers": 4, "first_k_dense_replace": 1})
VOCAB, PADDED = 11, 12


def probe(world: World) -> dict[str, Any]:
    """What is asked of each layout."""
    layout = world.layout
    if layout.context > 1:
        return attention_of_a_slice(world)
    if layout.tensor > 1:
        return {
            "vocab": {vocab: vocabulary_slice(world, vocab) for vocab in (VOCAB, PADDED // 2, 3)},
            "no tokens": vocabulary_slice(world, VOCAB, number=0),
            "ours": latent_gradients(world, stock=False),
            "stock": latent_gradients(world, stock=True),
            "weights": drawn_weights(world),
            "uneven": uneven_parts(world),
        }
    if layout.expert > 1:
        return {"weights": drawn_weights(world)}
    return {"ours": latent_gradients(world, stock=False), "stock": latent_gradients(world, stock=True)}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    """Results of the ranks of every layout of one and two processes."""
    pairs = dict(zip(("CP2", "TP2", "EP2"), run_layouts(probe, [CP2, TP2, EP2]), strict=True))
    return {"one": run_world(probe, ONE), **pairs}


# ---- context parallelism


def attention_inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value [16, 2, heads, width] of a whole sequence, and the gradient from above."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((16, 2, 4, 10), (16, 2, 2, 10), (16, 2, 2, 6))
    return [torch.randn(s, generator=draw) for s in shapes], torch.randn(16, 2, 4 * 6, generator=draw)


def attention_of_a_slice(world: World) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_r1.model.attention import TorchCoreAttention

    config = TransformerConfig(num_layers=1, hidden_size=40, num_attention_heads=4, context_parallel_size=2)
    groups = SimpleNamespace(cp=parallel_state.get_context_parallel_group())
    attention = TorchCoreAttention(config, 1, None, "self", k_channels=10, pg_collection=groups)
    whole, above = attention_inputs()
    mine = torch.from_numpy(zigzag([0, len(above)], 2, world.context_rank))
    inputs = [x[mine].requires_grad_() for x in whole]
    output = attention(*inputs)
    output.backward(above[mine])
    return {"output": output.detach(), "gradients": [x.grad for x in inputs]}


def test_context_parallel_attention_equals_one_process(found: dict[str, list[Any]]) -> None:
    inputs, above = attention_inputs()
    for x in inputs:
        x.requires_grad_()
    expected = slow_attention(*inputs, scale=None)
    expected.backward(above)
    for rank, result in enumerate(found["CP2"]):
        held = zigzag([0, 16], 2, rank)
        torch.testing.assert_close(result["output"], expected.detach()[held], rtol=0, atol=2e-6)
        for mine, x in zip(result["gradients"], inputs, strict=True):
            torch.testing.assert_close(mine, x.grad[held], rtol=0, atol=5e-6)


# ---- vocabulary slices


def head_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [12, 5], the whole output weights, targets, and the gradient from above."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(12, 5, generator=draw)
    weight = 2 * torch.randn(PADDED, 5, generator=draw)
    weight[VOCAB:] = 30.0  # the padding must not count
    return hidden, weight, torch.arange(12) % VOCAB, torch.randn(12, generator=draw)


def vocabulary_slice(world: World, vocab: int, number: int = 12) -> dict[str, Any]:
    """The head on this rank's slice of a vocabulary of `vocab` entries, for the first `number` tokens."""
    hidden, weight, targets, above = head_inputs()
    hidden = hidden[:number].requires_grad_()
    mine = weight.chunk(2)[world.tensor_rank].clone().requires_grad_()
    log_probs, entropy = token_log_probs(
        hidden,
        mine,
        targets[:number] % vocab,
        vocab_size=vocab,
        temperature=0.7,
        group=world.tensor_group,
        block_rows=4,
    )
    (log_probs * above[:number]).sum().backward()
    return {"log_probs": log_probs.detach(), "entropy": entropy, "hidden": hidden.grad, "weight": mine.grad}


@pytest.mark.parametrize("vocab", [VOCAB, PADDED // 2, 3])
def test_slices_of_the_vocabulary_equal_the_whole(found: dict[str, list[Any]], vocab: int) -> None:
    """With 6 entries or fewer the second rank holds padding only."""
    hidden, weight, targets, above = head_inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected, entropy = slow_log_probs((hidden @ weight.T)[None], targets[None] % vocab, vocab, 0.7)
    (expected[0] * above).sum().backward()
    ranks = [result["vocab"][vocab] for result in found["TP2"]]
    assert torch.equal(ranks[0]["log_probs"], ranks[1]["log_probs"])
    assert torch.equal(ranks[0]["entropy"], ranks[1]["entropy"])
    whole = {
        "log_probs": expected[0].detach(),
        "entropy": entropy[0].detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
    }
    joined = {
        **ranks[0],
        "hidden": ranks[0]["hidden"] + ranks[1]["hidden"],
        "weight": torch.cat([ranks[0]["weight"], ranks[1]["weight"]]),
    }
    for name, right in whole.items():
        torch.testing.assert_close(joined[name].double(), right, rtol=0, atol=1e-6 * right.abs().max().item())
    assert torch.equal(joined["weight"][vocab:], torch.zeros(PADDED - vocab, 5))


def test_no_tokens_under_tensor_parallelism(found: dict[str, list[Any]]) -> None:
    for result in found["TP2"]:
        nothing = result["no tokens"]
        assert nothing["log_probs"].shape == nothing["entropy"].shape == (0,)
        assert nothing["hidden"].shape == (0, 5)
        assert torch.equal(nothing["weight"], torch.zeros(PADDED // 2, 5))


# ---- multi-latent attention under tensor parallelism


def latent_gradients(world: World, stock: bool) -> dict[str, torch.Tensor]:
    """Whole gradients of every weight of one attention layer whose whole weights and input are fixed."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.spec_utils import build_module

    from megatron_r1.model import specs
    from megatron_r1.model.megatron_config import transformer_config

    config = transformer_config(architecture(MODEL, 96), MODEL, world.layout, on_cpu=True)
    spec = specs.decoder_spec(config, None).layer_specs[0].submodules.self_attention
    assert spec.module is specs.ReplicatedMLASelfAttention
    if stock:
        spec.module = MLASelfAttention
    attention = build_module(spec, config=config, layer_number=1)
    size, rank = world.layout.tensor, world.tensor_rank
    for name, parameter in attention.named_parameters():
        dim = shard_dim(parameter)
        shape = [n * size if i == dim else n for i, n in enumerate(parameter.shape)]
        whole = fixed(name, shape)
        with torch.no_grad():
            parameter.copy_(whole if dim is None else whole.chunk(size, dim)[rank])
    hidden, above = fixed("hidden", [12, 2, config.hidden_size]), fixed("above", [12, 2, config.hidden_size])
    output, _ = attention(10 * hidden.chunk(size)[rank], None)
    output.backward(above.chunk(size)[rank])
    return {name: whole_gradient(p, world) for name, p in attention.named_parameters()}


def shard_dim(parameter: torch.Tensor) -> int | None:
    """Along which dimension tensor-parallel ranks share it; None: each has all of it."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def fixed(name: str, shape: list[int]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.3 * draw if "layernorm" in name else 0.2 * draw


def whole_gradient(parameter: torch.Tensor, world: World) -> torch.Tensor:
    gradient, dim = parameter.grad.contiguous(), shard_dim(parameter)
    if world.layout.tensor == 1:
        return gradient
    if dim is None:  # each rank saw its part of the sequence; Megatron sums those marked sequence_parallel
        assert parameter.sequence_parallel
        dist.all_reduce(gradient, group=world.tensor_group)
        return gradient
    parts = [torch.empty_like(gradient) for _ in range(world.layout.tensor)]
    dist.all_gather(parts, gradient, group=world.tensor_group)
    return torch.cat(parts, dim)


def test_our_latent_attention_has_the_gradient_of_one_process(found: dict[str, list[Any]]) -> None:
    (one,) = found["one"]
    assert {name.split(".")[0] for name in one["ours"]} >= {"linear_kv_down_proj", "linear_q_down_proj", "linear_proj"}
    for result in found["TP2"]:
        assert result["ours"].keys() == one["ours"].keys()
        for name, gradient in one["ours"].items():
            assert torch.equal(gradient, one["stock"][name]), "on one process the two are the same module"
            torch.testing.assert_close(result["ours"][name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max())


def test_the_stock_latent_attention_still_has_a_wrong_one(found: dict[str, list[Any]]) -> None:
    """Megatron-LM issue 1699: the shared rope key's gradient is not summed over tensor-parallel ranks.

    When this fails, Megatron-Core has mended it: ReplicatedMLASelfAttention may go.
    """
    (one,) = found["one"]
    rank = architecture(MODEL, 96)["kv_lora_rank"]
    for result in found["TP2"]:
        for name, gradient in one["stock"].items():
            error = (result["stock"][name] - gradient).abs() / gradient.abs().max()
            if name == "linear_kv_down_proj.weight":
                assert error[:rank].max() < 1e-4
                assert error[rank:].max() > 0.1, "upstream is right now"
            else:
                assert error.max() < 1e-4, name


# ---- freshly drawn weights


def drawn_weights(world: World) -> list[tuple[str, bool, str, float]]:
    """(name, whether tensor-parallel ranks share it, digest, largest value) of every parameter of a fresh model."""
    from megatron_r1.model.build import build_model

    (chunk,) = build_model(architecture(MODEL, 96), MODEL, world)
    return [
        (name, shard_dim(p) is not None, hashlib.sha256(p.detach().numpy().tobytes()).hexdigest(), float(p.abs().max()))
        for name, p in chunk.named_parameters()
    ]


def experts(result: dict[str, Any]) -> list[str]:
    return [digest for name, _, digest, _ in result["weights"] if ".experts." in name and "linear_fc1" in name]


def assert_all_differ(ranks: list[dict[str, Any]], number: int) -> None:
    digests = [digest for result in ranks for digest in experts(result)]
    assert len(digests) == number
    assert len(set(digests)) == number, "two experts start with the same weights"


def test_experts_of_all_ranks_differ(found: dict[str, list[Any]]) -> None:
    """Drawn from the default CPU generator, expert 0 of every expert-parallel rank would be the same."""
    arch = architecture(MODEL, 96)
    layers = arch["num_hidden_layers"] - arch["first_k_dense_replace"] + arch["num_nextn_predict_layers"]
    assert_all_differ(found["EP2"], arch["n_routed_experts"] * layers)


def test_replicas_agree_on_everything_but_experts(found: dict[str, list[Any]]) -> None:
    first, second = ([w for w in result["weights"] if ".experts." not in w[0]] for result in found["EP2"])
    assert first == second and len(first) > 20


def test_experts_differ_between_stages_too() -> None:
    ranks = run_world(probe, PP2_EP2)
    arch = architecture(MODEL, 96)
    layers = arch["num_hidden_layers"] - arch["first_k_dense_replace"] + arch["num_nextn_predict_layers"]
    assert all(experts(result) for result in ranks), "every stage has experts"
    assert_all_differ(ranks, arch["n_routed_experts"] * layers)
    attention = [
        {digest for name, _, digest, _ in result["weights"] if name.endswith("linear_proj.weight")} for result in ranks
    ]
    assert len(set.union(*attention)) == arch["num_hidden_layers"] + arch["num_nextn_predict_layers"]


def test_tensor_parallel_ranks_share_what_is_replicated_and_nothing_else(found: dict[str, list[Any]]) -> None:
    replicated = 0
    for (name, sharded, digest, _), (other, _, other_digest, _) in zip(
        *(result["weights"] for result in found["TP2"]), strict=True
    ):
        assert name == other
        expert = ".experts." in name  # whole on either rank with expert tensor parallelism 1, and the same
        assert (digest != other_digest) is (sharded and not expert), name
        replicated += not sharded
    assert replicated > 20


# ---- gloo's missing uneven collectives


def uneven_parts(world: World) -> dict[str, Any]:
    from megatron.core.tensor_parallel import mappings

    rank, group = world.tensor_rank, world.tensor_group
    part = torch.arange(8.0).reshape(4, 2).split([3, 1])[rank]
    whole = (rank + 1) * torch.arange(8.0).reshape(4, 2)
    return {
        "gathered": mappings._gather_along_first_dim(part, group, [3, 1]).tolist(),
        "scattered": mappings._reduce_scatter_along_first_dim(whole, group, [1, 3]).tolist(),
        "even": mappings._reduce_scatter_along_first_dim(whole, group).tolist(),
    }


def test_uneven_gather_and_scatter(found: dict[str, list[Any]]) -> None:
    rows = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    tripled = [[3 * x for x in row] for row in rows]
    results = [result["uneven"] for result in found["TP2"]]
    assert [r["gathered"] for r in results] == [rows, rows]
    assert [r["scattered"] for r in results] == [tripled[:1], tripled[1:]]
    assert list(itertools.chain(*(r["even"] for r in results))) == tripled
