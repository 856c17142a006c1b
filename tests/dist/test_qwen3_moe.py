"""A Qwen3 mixture of experts: layouts equal one process, routing is recorded and replayed, checkpoints stack layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.parallel.world import World
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective
from tests.dist.harness import run_layouts, run_world
from tests.dist.layout_table import BOUNDS, STEPS, differences, train_all, weights
from tests.dist.test_routing import sample_and_score
from tests.dist.workload import TOKENIZER, make_trainer, samples, save_start

pytestmark = pytest.mark.slow

LAYERS, EXPERTS, HIDDEN, WIDTH, HEAD = 4, 8, 48, 24, 16
VOCAB = TOKENIZER.vocab_size
ARCHITECTURE = dict(
    model_type="qwen3_moe",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=64,
    moe_intermediate_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD,
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    max_position_embeddings=256,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    initializer_range=0.1,
)
ONE = ParallelConfig(data=1)
LAYOUTS = {
    "EP2": ParallelConfig(data=2, expert=2),
    "PP2": ParallelConfig(pipeline=2),
    "TP2 x EP2": ParallelConfig(tensor=2, expert=2),
}
# Names and shapes of Megatron's checkpoints, whatever the layout; Transformer Engine's layers save under the same.
STACKED = {
    "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
    "output_layer.weight": (VOCAB, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
    "decoder.layers.self_attention.linear_qkv.weight": (LAYERS, (4 + 2 + 2) * HEAD, HIDDEN),
    "decoder.layers.self_attention.q_layernorm.weight": (LAYERS, HEAD),
    "decoder.layers.self_attention.k_layernorm.weight": (LAYERS, HEAD),
    "decoder.layers.self_attention.linear_proj.weight": (LAYERS, HIDDEN, 4 * HEAD),
    "decoder.layers.pre_mlp_layernorm.weight": (LAYERS, HIDDEN),
    "decoder.layers.mlp.router.weight": (LAYERS, EXPERTS, HIDDEN),
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": (LAYERS, EXPERTS, 2 * WIDTH, HIDDEN),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": (LAYERS, EXPERTS, HIDDEN, WIDTH),
}


def work(world: World, model: ModelConfig, saved: str, root: str) -> dict[str, Any]:
    """Training steps of `grpo`, then from the start again: record what is chosen, and replay other experts."""
    history = train_all(world, model, saved, root, ["grpo"])["grpo"]
    trainer = make_trainer(world, model)
    checkpoint_io.load_weights(folders.folder(Path(root) / "grpo", 0), trainer)
    sampled = sample_and_score(world, trainer)
    batch = samples()
    batcher = Batcher(world, 160, pad_id=0, packed=True)
    scored = compute_log_probs(trainer, batch, batcher, temperature=1.0, record=True)
    experts = [found.experts for found in scored]
    for i, (sample, chosen) in enumerate(zip(batch, experts, strict=True)):
        sample.routed_experts = (chosen + 3) % EXPERTS if i % 2 else None
    step = trainer.train_step(batcher(batch, trainer.mtp_depths), LanguageModelObjective(mtp_loss=0.0))
    return {
        "history": history,
        "sampled": sampled,
        "experts": experts,
        "metrics": step.routing,
        "grad_norm": step.grad_norm,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen3_moe")
    (root / "config.json").write_text(json.dumps(ARCHITECTURE))
    run_world(save_start, ONE, str(root / "start" / "grpo"), ModelConfig(config=root))
    return root


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = run_world(work, ONE, ModelConfig(config=root), str(root / "one"), str(root / "start"))[0]
    return found


@pytest.fixture(scope="module")
def many(root: Path) -> dict[str, list[dict[str, Any]]]:
    each = [(ModelConfig(config=root), str(root / name)) for name in LAYOUTS]
    return dict(zip(LAYOUTS, run_layouts(work, list(LAYOUTS.values()), str(root / "start"), each=each), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(layout: str, root: Path, one: Any, many: Any) -> None:
    assert len({loss for loss, _ in one["history"]}) == STEPS
    for rank in many[layout]:
        for (loss, norm), (loss_of_one, norm_of_one) in zip(rank["history"], one["history"], strict=True):
            assert abs(loss - loss_of_one) <= BOUNDS["loss"]
            assert abs(norm - norm_of_one) / norm_of_one <= BOUNDS["grad_norm"]
    largest, mean = differences(weights(root / layout / "grpo"), weights(root / "one" / "grpo"))
    assert largest <= BOUNDS["param_max"] and mean <= BOUNDS["param_mean"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_equals_one_process(layout: str, one: Any, many: Any) -> None:
    lengths = [len(sample.token_ids) for sample in samples()]
    assert [e.shape for e in one["experts"]] == [(length, LAYERS, 2) for length in lengths]
    assert one["metrics"]["moe/replay_coverage"] == pytest.approx(sum(lengths[1::2]) / sum(lengths))
    assert one["metrics"]["moe/replay_agreement"] < 0.5  # other experts than the router's own
    for rank in many[layout]:
        for chosen, expected in zip(rank["experts"], one["experts"], strict=True):
            np.testing.assert_array_equal(chosen, expected)
        assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
        assert rank["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_the_engine_records_what_a_pass_over_the_whole_sequence_chooses(one: Any, many: Any) -> None:
    for rank in (one, *many["EP2"]):
        assert len(rank["sampled"]) == 12
        for engine, trainer in rank["sampled"]:
            np.testing.assert_array_equal(engine[:-1], trainer[:-1])


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_checkpoints_stack_the_layers(layout: str, root: Path, one: Any, many: Any) -> None:
    saved = weights(root / layout / "grpo")
    assert {name.removeprefix("model."): tuple(x.shape) for name, x in saved.items()} == STACKED
    assert all(torch.isfinite(x).all() for x in saved.values())
