"""Which completions are scored by which reward model, in which phases, and what each is given to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_r1.config.errors import RunFailed
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.parallel.world import World
from megatron_r1.rewards.reward_client import Item, RewardClient
from megatron_r1.train.reward_models import RewardModels, _Server, template_of
from megatron_r1.types import Completion, Group, Prompt


class Lengths:
    """The value of a text is its length; those over 20 characters count as cut."""

    def __init__(self) -> None:
        self.asked: list[list[Item]] = []

    def values(self, items: Sequence[Item]) -> tuple[list[float], int, int]:
        self.asked.append(list(items))
        return [float(len(item.response)) for item in items], sum(len(i.response) > 20 for i in items), len(items)


def reward(name: str, **keys: Any) -> RewardConfig:
    return RewardConfig.model_validate({"kind": "model", "name": name, "url": "http://x:1", **keys})


def group(name: str, domain: str, *texts: str) -> Group:
    prompt = Prompt(id=name, question=f"{name}?", text="", token_ids=[1], answer=None, verifier="none", domain=domain)
    return Group(
        prompt=prompt,
        completions=[
            Completion(token_ids=[1], log_probs=[0.0], finish_reason="stop", weight_versions=(0, 0), text=text)
            for text in texts
        ],
    )


def test_each_model_reads_its_own_prompts() -> None:
    helpful, safety = Lengths(), Lengths()
    models = RewardModels(
        [
            (reward("helpful", domains=["general"], sees="summary", last_steps=4), helpful),
            (reward("safety", domains=["harm"], last_steps=2), safety),
        ],
        steps=10,
    )
    thought = "<think>long thought</think> <answer>yes</answer>"
    groups = [
        group("a", "reasoning", "1"),
        group("b", "general", thought, "<think>never closed"),
        group("c", "harm", thought),
    ]
    models.value(groups, step=5)
    assert helpful.asked == safety.asked == [] and models.metrics() == {}
    models.value(groups, step=6)
    assert helpful.asked == [[Item("b?", "yes"), Item("b?", "")]] and safety.asked == []
    assert [c.values for g in groups for c in g.completions] == [{}, {"helpful": 3.0}, {"helpful": 0.0}, {}]
    models.value(groups, step=8)
    assert safety.asked == [[Item("c?", thought)]]
    assert groups[2].completions[0].values == {"safety": float(len(thought))}
    assert models.metrics() == {"reward/model_cut/helpful": 0.0, "reward/model_cut/safety": 1.0}
    assert models.metrics() == {}


def test_shares_of_several_rounds_are_joined() -> None:
    models = RewardModels([(reward("m"), Lengths())], steps=1)
    models.value([group("a", "reasoning", "x" * 30)], 0)
    models.value([group("a", "reasoning", "x", "y", "z")], 0)
    assert models.metrics() == {"reward/model_cut/m": 0.25}


def test_a_server_that_stays_away_ends_every_rank_alike(world: World) -> None:
    class Away(RewardClient):
        def score(self, items: Sequence[Item]) -> tuple[list[float], int]:
            raise RunFailed("it is away")

    with pytest.raises(RunFailed, match="it is away"):
        _Server(Away("m", "http://x:1", 1.0), world).values([Item("a", "b")])


def test_the_template_is_the_one_of_training() -> None:
    text = {
        "name": "x",
        "model": {"preset": "tiny-dense"},
        "tokenizer": {"kind": "char"},
        "stage": [
            {
                "name": "helpful",
                "kind": "reward_model",
                "steps": 1,
                "optimizer": {"lr": 1e-3},
                "pairs": {"path": "x.jsonl", "template": "Q {prompt} A"},
            }
        ],
    }
    config = RunConfig.model_validate(text)
    inside = RewardConfig.model_validate({"kind": "model", "name": "m", "from": "helpful"})
    folder = RewardConfig.model_validate({"kind": "model", "name": "m", "from": "elsewhere", "template": "r1-zero"})
    bare = RewardConfig.model_validate({"kind": "model", "name": "m", "from": "elsewhere"})
    assert [template_of(each, config) for each in (inside, folder, bare)] == ["Q {prompt} A", "r1-zero", "plain"]
