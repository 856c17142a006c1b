"""Which completions are scored by which reward model, in which phases, and what each is given to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import RunFailed, UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.observe.names import check_names
from megatron_r1.parallel.world import World
from megatron_r1.rewards.reward_client import Item, RewardClient
from megatron_r1.train.reward_models import RewardModels, _Here, _note, _Seen, _Server, template_of
from megatron_r1.types import Completion, Group, Prompt


class Lengths:
    """The value of a text is its length; those over 20 characters count as cut."""

    def __init__(self) -> None:
        self.asked: list[list[Item]] = []

    def values(self, items: Sequence[Item]) -> tuple[list[float], int]:
        self.asked.append(list(items))
        return [float(len(item.response)) for item in items], sum(len(i.response) > 20 for i in items)


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


def test_each_model_reads_its_own_prompts(world: World) -> None:
    helpful, safety = Lengths(), Lengths()
    models = RewardModels(
        [
            (reward("helpful", domains=["general"], sees="summary", last_steps=4), helpful),
            (reward("safety", domains=["harm"], last_steps=2), safety),
        ],
        steps=10,
        world=world,
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
    assert helpful.asked == [[Item("b?", "yes")]] and safety.asked == []
    assert [c.values for g in groups for c in g.completions] == [{}, {"helpful": 3.0}, {"helpful": 3.0}, {}]
    models.value(groups, step=8)
    assert safety.asked == [[Item("c?", thought)]]
    assert groups[2].completions[0].values == {"safety": float(len(thought))}
    assert models.metrics() == {
        "reward/model_cut/helpful": 0.0,
        "reward/model_unfinished/helpful": 0.5,
        "reward/model_cut/safety": 1.0,
        "reward/model_unfinished/safety": 0.0,
    }
    assert models.metrics() == {}


def cut_off(name: str, *texts: str) -> Group:
    made = group(name, "reasoning", *texts)
    for completion in made.completions:
        completion.finish_reason = "length"
    return made


def test_unfinished_and_empty_answers_get_the_lowest_value(world: World) -> None:
    source = Lengths()
    models = RewardModels([(reward("m"), source)], steps=1, world=world)
    first = [group("a", "reasoning", "xxxx", "xxxxxxx", "  "), cut_off("b", "x" * 99)]
    models.value(first, 0)
    assert [c.values["m"] for g in first for c in g.completions] == [4.0, 7.0, 4.0, 4.0]
    assert [len(item.response) for item in source.asked[0]] == [4, 7], "the others are not even asked for"
    second = [group("c", "reasoning", "xxxxx"), cut_off("d", "x")]  # a further round of the same phase
    models.value(second, 0)
    assert [c.values["m"] for g in second for c in g.completions] == [5.0, 4.0]
    assert models.metrics() == {"reward/model_cut/m": 0.0, "reward/model_unfinished/m": 0.5}
    alone = [cut_off("e", "xx", "x")]  # a phase without one finished answer
    models.value(alone, 0)
    assert [c.values["m"] for c in alone[0].completions] == [0.0, 0.0]
    found = models.metrics()
    assert found == {"reward/model_unfinished/m": 1.0}
    check_names(list(found))


class Replicas:
    """Replica 1 of 2; `others` is what replica 0 passes to each gather."""

    replica_rank, replicas, is_leader = 1, 2, True

    def __init__(self, *others: Any) -> None:
        self.others = list(others)

    def all_gather_replicas(self, mine: Any) -> list[Any]:
        return [self.others.pop(0), mine]

    def broadcast_in_replica(self, value: Any) -> Any:
        return value


def test_the_lowest_value_is_that_of_all_replicas() -> None:
    world = Replicas(_Seen(scored=3, cut=1, unfinished=0, lowest=2.0))
    models = RewardModels([(reward("m"), Lengths())], steps=1, world=world)  # type: ignore[arg-type]
    groups = [group("a", "reasoning", "xxxx"), cut_off("b", "x" * 9)]
    models.value(groups, 0)
    assert [c.values["m"] for g in groups for c in g.completions] == [4.0, 2.0]
    assert models.metrics() == {"reward/model_cut/m": 0.25, "reward/model_unfinished/m": 0.2}


def test_a_text_that_one_replica_cannot_encode_ends_all_alike() -> None:
    class Scorer:
        def sequence(self, question: str, answer: str) -> Any:
            raise UserError(f"no token for {answer!r}")

    ends_here = _Here(Scorer(), Replicas([]))  # type: ignore[arg-type]
    ends_there = _Here(Scorer(), Replicas("no token for 'y'"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no token for 'x'"):
        ends_here.values([Item("q", "x")])
    with pytest.raises(UserError, match="no token for 'y'"):
        ends_there.values([])


def test_shares_of_several_rounds_are_joined(world: World) -> None:
    models = RewardModels([(reward("m"), Lengths())], steps=1, world=world)
    models.value([group("a", "reasoning", "x" * 30)], 0)
    models.value([group("a", "reasoning", "x", "y", "z")], 0)
    assert models.metrics() == {"reward/model_cut/m": 0.25, "reward/model_unfinished/m": 0.0}


def test_a_server_that_stays_away_ends_every_rank_alike(world: World) -> None:
    class Away(RewardClient):
        def score(self, items: Sequence[Item]) -> tuple[list[float], int]:
            raise RunFailed("it is away")

    with pytest.raises(RunFailed, match="it is away"):
        _Server(Away("m", "http://x:1", 1.0), world).values([Item("a", "b")])


def test_the_checkpoints_that_answered_are_written_down(tmp_path: Path) -> None:
    for checkpoint in ("step-8", "step-9"):
        _note(tmp_path / "rl2" / "reward-servers.jsonl", reward("helpful"), checkpoint)
    rows = [json.loads(line) for line in (tmp_path / "rl2" / "reward-servers.jsonl").read_text().splitlines()]
    assert [(row["name"], row["url"], row["checkpoint"]) for row in rows] == [
        ("helpful", "http://x:1", "step-8"),
        ("helpful", "http://x:1", "step-9"),
    ]


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
