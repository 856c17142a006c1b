"""A reward model gives one process's values under every layout, on every rank, and each replica gets those of its own
completions."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.checkpoint import folders
from megatron_r1.checkpoint import io as checkpoint_io
from megatron_r1.config.model import ModelConfig, ParallelConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.model.presets import architecture
from megatron_r1.model.scalar_head import HEAD
from megatron_r1.parallel.world import World
from megatron_r1.train.reward_models import RewardModels, _Here
from megatron_r1.train.reward_scoring import RewardScorer
from megatron_r1.types import Completion, Group, Prompt
from tests.dist.harness import run_layouts, run_world
from tests.dist.reward_workload import make_trainer
from tests.dist.workload import TOKENIZER

pytestmark = pytest.mark.slow

PROMPTS = 9  # of which one is of a domain that the model does not score
COMPLETIONS = 2
SEQUENCE = ParallelConfig(data=1, tensor=2)
TWO = {
    "TP2 with sequence parallelism": (SEQUENCE, "tiny-moe"),
    "TP2 without": (ParallelConfig(data=1, tensor=2, sequence=False), "tiny-dense"),
    "PP2": (ParallelConfig(data=1, pipeline=2), "tiny-moe"),
    "VPP2": (ParallelConfig(data=1, pipeline=2, virtual_pipeline=2), "tiny-dense"),
    "CP2": (ParallelConfig(data=1, context=2), "tiny-moe"),
    "DP2": (ParallelConfig(data=2), "tiny-dense"),
    "EP2": (ParallelConfig(data=2, expert=2), "tiny-moe"),
    "EP2, allgather": (ParallelConfig(data=2, expert=2, dispatcher="allgather"), "tiny-moe"),
}
FOUR = {
    "TP2 x PP2": (ParallelConfig(data=1, tensor=2, pipeline=2), "tiny-moe"),
    "PP2 x CP2 x EP2": (ParallelConfig(data=1, pipeline=2, context=2, expert=2), "tiny-moe"),
    "DP2 x CP2": (ParallelConfig(data=2, context=2), "tiny-moe"),
}

Values = dict[str, list[float]]
"""Prompt -> values of its completions."""


def save(world: World, root: str) -> None:
    """A reward model of each preset whose head matters."""
    import torch

    for preset in ("tiny-moe", "tiny-dense"):
        trainer = make_trainer(world, preset)
        for name, tensor in trainer.models[0].named_parameters():
            if name.endswith(HEAD):
                tensor.data.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)))
        checkpoint_io.save(Path(root) / preset, trainer, {}, None, keep=1)


def groups() -> list[Group]:
    """Ragged answers; the second prompt is not the model's."""
    made = []
    for n in range(PROMPTS):
        domain = "other" if n == 1 else "general"
        prompt = Prompt(
            id=f"p{n}", question=f"{n}+{n}=?", text="", token_ids=[2], answer=None, verifier="none", domain=domain
        )
        texts = [f"<think>{n}</think> it is {n * i} " * (1 + (3 * n + i) % 4) for i in range(COMPLETIONS)]
        made.append(
            Group(
                prompt=prompt,
                completions=[
                    Completion(token_ids=[2], log_probs=[0.0], finish_reason="stop", weight_versions=(0, 0), text=text)
                    for text in texts
                ],
            )
        )
    return made


def score(world: World, preset: str, root: str) -> Values:
    """What this rank knows of its replica's completions afterwards."""
    model = ModelConfig(preset=preset)
    scorer = RewardScorer.load(
        folders.folder(Path(root) / preset, 0),
        model,
        architecture(model, TOKENIZER.vocab_size),
        world,
        TOKENIZER,
        template="Q: {prompt} ",
        micro_batch_tokens=160,
        packed=True,
        parked=True,
    )
    reward = RewardConfig.model_validate({"kind": "model", "name": "m", "from": "x", "domains": ["general"]})
    models = RewardModels([(reward, _Here(scorer, world))], steps=1, world=world)
    mine = groups()[world.replica_rank :: world.replicas]
    models.value(mine, 0)
    assert models.metrics() == {"reward/model_cut/m": 0.0, "reward/model_unfinished/m": 0.0}
    return {group.prompt.id: [c.values["m"] for c in group.completions if c.values] for group in mine}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("values"))
    run_world(save, ParallelConfig(data=1), folder)
    return folder


@pytest.fixture(scope="module")
def one(root: str) -> dict[str, Values]:
    presets = ("tiny-moe", "tiny-dense")
    found = run_layouts(score, [ParallelConfig(data=1)] * 2, root, each=[(preset,) for preset in presets])
    return dict(zip(presets, (ranks[0] for ranks in found), strict=True))


@pytest.mark.parametrize("layouts", [TWO, FOUR], ids=["two", "four"])
def test_values_equal_one_process(
    layouts: dict[str, tuple[ParallelConfig, str]], root: str, one: dict[str, Values]
) -> None:
    each = list(layouts.values())
    found = run_layouts(score, [layout for layout, _ in each], root, each=[(preset,) for _, preset in each])
    for (name, (layout, preset)), ranks in zip(layouts.items(), found, strict=True):
        replicas = layout.data * layout.context
        seen: Values = {}
        for values in ranks:
            assert len(values) in (PROMPTS // replicas, -(-PROMPTS // replicas)), name
            for prompt, numbers in values.items():
                assert seen.setdefault(prompt, numbers) == numbers, f"{name}: ranks of a replica disagree"
        assert seen.keys() == one[preset].keys(), name
        for prompt, numbers in seen.items():
            assert numbers == pytest.approx(one[preset][prompt], abs=3e-6), f"{name}, {prompt}"


def test_the_workload_tests_something(one: dict[str, Values]) -> None:
    for values in one.values():
        assert values["p1"] == [] and len(values) == PROMPTS
        numbers = [round(number, 4) for row in values.values() for number in row]
        assert len(set(numbers)) == len(numbers) == (PROMPTS - 1) * COMPLETIONS
        assert max(map(abs, numbers)) > 0.1
