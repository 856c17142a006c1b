"""What routers choose, count and replay is the same for every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.config.optim import SamplingConfig
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.rollout.megatron import MegatronEngine
from megatron_r1.train.log_probs import compute_log_probs
from megatron_r1.train.micro_batches import Batcher
from megatron_r1.train.objectives import LanguageModelObjective
from megatron_r1.train.trainer import Trainer
from megatron_r1.types import Prompt, Sample
from tests.dist.harness import run_layouts, run_world
from tests.dist.workload import OPTIMIZER, TOKENIZER, samples

pytestmark = pytest.mark.slow  # in the default tier the end-to-end recipe replays experts

LAYERS = (1, 2, 3)  # with experts, of four: the first of two pipeline stages has one of them
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2),
    "pipeline": ParallelConfig(pipeline=2),
    "virtual": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "expert": ParallelConfig(expert=2),
    "context": ParallelConfig(context=2),
}


def make_trainer(world: World, **fields: Any) -> Trainer:
    config = ModelConfig(preset="tiny-moe", override={"num_hidden_layers": 4}, megatron=fields)
    return Trainer(architecture(config, TOKENIZER.vocab_size), config, world, OPTIMIZER, steps=10)


def save_start(world: World, root: str) -> None:
    trainer = make_trainer(world)
    draw = torch.Generator().manual_seed(5)
    for model in trainer.models:
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.05 * torch.rand(buffer.shape, generator=draw))
    checkpoint_io.save(Path(root), trainer, {}, None, keep=1)


def route(world: World, root: str) -> dict[str, Any]:
    """Record in one model, replay half of it in training with recomputation; what the routers then know."""
    trainer = make_trainer(world, **RECOMPUTE)
    checkpoint_io.load_weights(folders.folder(Path(root), 0), trainer)
    sampled = sample_and_score(world, trainer)
    batch = samples()
    batcher = Batcher(world, 160, pad_id=0, packed=True)
    scored = compute_log_probs(trainer, batch, batcher, temperature=1.0, record=True)
    experts = [found.experts for found in scored]
    for i, (sample, chosen) in enumerate(zip(batch, experts, strict=True)):
        sample.routed_experts = (chosen + 3) % 8 if i % 2 else None
    step = trainer.train_step(batcher(batch, trainer.mtp_depths), LanguageModelObjective(mtp_loss=0.1))
    biases = {}
    for model in trainer.models:
        for layer in model.decoder.layers:
            if layer.is_moe_layer:
                biases[layer.layer_number - 1] = layer.mlp.router.expert_bias.tolist()
        if model.mtp_process:
            biases["mtp"] = model.mtp.layers[0].transformer_layer.mlp.router.expert_bias.tolist()
    return {
        "sampled": sampled,
        "experts": experts,
        "metrics": step.routing,
        "grad_norm": step.grad_norm,
        "biases": biases,
    }


def sample_and_score(world: World, trainer: Trainer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each completion: the experts that the engine recorded, and those of a pass over the whole sequence."""
    engine = MegatronEngine(trainer.chunks, world, TOKENIZER, int(trainer.arch["vocab_size"]), 256, trainer.taps)
    texts = ["1+2=?", "12-3+4=?", "7=?", "5-6+9-1+2=?"][world.replica_rank :: world.replicas]
    prompts = [
        Prompt(id=t, question=t, text=t, token_ids=TOKENIZER.encode(t), answer=None, verifier="integer") for t in texts
    ]
    groups = engine.generate(prompts, 3, SamplingConfig(max_new_tokens=12, batch_size=5, stop=["7", "+"]), seed=7)
    mine = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    pairs = [pair for share in world.all_gather_replicas(mine) for pair in share]
    flat = [Sample(token_ids=[*p.token_ids, *c.token_ids], prompt_length=len(p.token_ids)) for p, c in pairs]
    scored = compute_log_probs(trainer, flat, Batcher(world, 160, pad_id=0), temperature=1.0, record=True)
    return [(c.routed_experts, found.experts) for (_, c), found in zip(pairs, scored, strict=True)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("start")
    run_world(save_start, ParallelConfig(), str(root))
    return root, run_world(route, ParallelConfig(), str(root))[0]


@pytest.fixture(scope="module")
def many(one: tuple[Path, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = run_layouts(route, list(LAYOUTS.values()), str(one[0]))
    return dict(zip(LAYOUTS, found, strict=True))


def test_one_process_records_all_and_replays_half(one: tuple[Path, dict[str, Any]]) -> None:
    found, lengths = one[1], [len(sample.token_ids) for sample in samples()]
    assert [e.shape for e in found["experts"]] == [(length, len(LAYERS), 2) for length in lengths]
    assert all(e.min() >= 0 and (e[..., 0] != e[..., 1]).all() for e in found["experts"])
    assert found["metrics"]["moe/replay_coverage"] == pytest.approx(sum(lengths[1::2]) / sum(lengths))
    assert {f"moe/max_violation/layer_{i}" for i in LAYERS} < found["metrics"].keys()
    assert set(found["biases"]) == {*LAYERS, "mtp"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_choices_equal_one_process(layout: str, one: Any, many: Any) -> None:
    for rank in many[layout]:
        for chosen, expected in zip(rank["experts"], one[1]["experts"], strict=True):
            np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_the_engine_records_what_a_pass_over_the_whole_sequence_chooses(layout: str, one: Any, many: Any) -> None:
    for rank in {"one": [one[1]], **many}[layout]:
        assert len(rank["sampled"]) == 12
        for engine, trainer in rank["sampled"]:
            assert engine.shape == trainer.shape and (engine[-1] == -1).all()
            np.testing.assert_array_equal(engine[:-1], trainer[:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_and_gradient_equal_one_process(layout: str, one: Any, many: Any) -> None:
    for rank in many[layout]:
        assert rank["metrics"] == pytest.approx(one[1]["metrics"], rel=1e-5, abs=1e-6)
        assert rank["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_biases_move_alike(layout: str, one: Any, many: Any) -> None:
    together = {layer: bias for rank in many[layout] for layer, bias in rank["biases"].items()}
    assert together.keys() == one[1]["biases"].keys()
    for layer, bias in together.items():
        assert bias == pytest.approx(one[1]["biases"][layer], abs=1e-6), layer
