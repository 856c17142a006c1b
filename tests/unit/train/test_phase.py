"""A rollout phase: minibatches partition it, it survives a checkpoint, its metrics are worked out by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron_r1.config.grpo import AdvantageConfig
from megatron_r1.config.stages import GrpoStage
from megatron_r1.observe.names import METRICS, check_names
from megatron_r1.parallel.world import World
from megatron_r1.rewards.mixer import RewardStats
from megatron_r1.train.phase import (
    NoSignal,
    Phase,
    distinct,
    group_metrics,
    group_samples,
    minibatch_order,
    phase_seed,
    sample_groups,
)
from megatron_r1.types import Completion, Group, LanguageUse, Prompt, Sample, Score, Verdict


def prompt(name: str) -> Prompt:
    return Prompt(id=name, question=name, text=name, token_ids=[7, 8], answer="4", verifier="integer")


def completion(
    length: int,
    reward: float,
    status: str = "correct",
    extracted: str | None = "4",
    finish: str = "stop",
    **parts: float,
) -> Completion:
    verdict = Verdict(status=status, extracted=extracted)  # type: ignore[arg-type]
    in_format = parts["format"] > 0 if "format" in parts else None
    score = Score(total=reward, parts=parts, verdict=verdict, in_format=in_format)
    return Completion(
        token_ids=list(range(length)),
        log_probs=[-0.5] * length,
        finish_reason=finish,  # type: ignore[arg-type]
        weight_versions=(0, 0),
        text="",
        score=score,
    )


def group(*completions: Completion, name: str = "p") -> Group:
    return Group(prompt=prompt(name), completions=list(completions))


@pytest.mark.parametrize(("count", "minibatches", "epochs"), [(48, 4, 1), (48, 5, 3), (7, 3, 2), (3, 5, 2), (1, 1, 1)])
def test_every_epoch_takes_every_sample_once_in_even_parts(count: int, minibatches: int, epochs: int) -> None:
    order = minibatch_order(count, minibatches, epochs, seed=3)
    parts = min(count, minibatches)
    assert len(order) == parts * epochs
    for epoch in range(epochs):
        taken = order[epoch * parts : (epoch + 1) * parts]
        assert sorted(i for part in taken for i in part) == list(range(count))
        sizes = [len(part) for part in taken]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_the_order_is_random_and_belongs_to_the_seed() -> None:
    one, again, other = (minibatch_order(48, 4, 2, seed) for seed in (3, 3, 4))
    assert one == again != other
    assert one[:4] != one[4:], "epochs differ"
    assert sorted(one[0]) != list(range(12)), "a minibatch mixes groups"


def test_seeds_of_phases_and_their_rounds_never_meet() -> None:
    used = {phase_seed(seed, step) + rounds for seed in range(5) for step in range(50) for rounds in range(64)}
    assert len(used) == 5 * 50 * 64


def phase() -> Phase:
    samples = [
        Sample(token_ids=[1, 2, 3], prompt_length=1, advantage=0.1 + 0.2, rollout_log_probs=[-0.1, -1 / 3]),
        Sample(
            token_ids=[4, 5],
            prompt_length=1,
            advantage=-1.0,
            rollout_log_probs=[-2.5],
            old_log_probs=[-2.25],
            reference_log_probs=[math.pi],
            loss_mask=[0, 1],
        ),
    ]
    return Phase(samples, order=[[1], [0]], taken=1, metrics={"reward/mean": 0.5})


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    box = io.BytesIO()
    torch.save(state, box)
    box.seek(0)
    return torch.load(box, weights_only=True)


@pytest.mark.parametrize("through", [through_json, through_torch])
def test_a_phase_survives_a_checkpoint(through: Any) -> None:
    before = phase()
    after = Phase.restore(through(before.state()))
    assert after == before
    assert after.minibatch() == [before.samples[0]] and not after.is_spent
    after.taken += 1
    assert after.is_spent and not before.is_spent


def test_metrics_by_hand() -> None:
    """Two groups: rewards 1.5, 0.5, 0 and 1, 1, 1; the first's majority answer is 4, the second's a wrong 5."""
    groups = [
        group(
            completion(4, 1.5, format=0.5),
            completion(10, 0.5, "unknown", None, "length", format=0.5),
            completion(6, 0.0, "wrong", "3", format=0.0),
        ),
        group(
            completion(2, 1.0, "wrong", "5", format=0.5),
            completion(2, 1.0, "wrong", "5", format=0.5),
            completion(12, 1.0, "correct", "4", "length", format=0.0),
        ),
    ]
    mean = 2 / 3
    spread = math.sqrt(((1.5 - mean) ** 2 + (0.5 - mean) ** 2 + mean**2) / 3)
    expected = {
        "reward/mean": 5 / 6,
        "reward/std": spread / 2,
        "reward/accuracy": 2 / 6,
        "reward/majority": 1 / 2,
        "reward/format": 4 / 6,
        "rollout/length": 36 / 6,
        "rollout/length_max": 12,
        "rollout/length_correct": (4 + 12) / 2,
        "rollout/length_wrong": (10 + 6 + 2 + 2) / 4,
        "rollout/truncated": 2 / 6,
        "rollout/completions": 6,
        "rollout/tokens": 36,
        "verdict/unknown": 1 / 6,
        "groups/no_signal": 1 / 2,
        "groups/all_correct": 0,
        "groups/all_wrong": 0,
    }
    found = group_metrics(groups)
    assert found == pytest.approx(expected)
    assert set(found) <= METRICS.keys()


def test_groups_that_are_all_right_or_all_wrong() -> None:
    right = group(completion(3, 1.0), completion(3, 0.4))
    wrong = group(completion(3, 0.0, "wrong", "9"), completion(3, 0.0, "unknown", None))
    metrics = group_metrics([right, wrong, wrong])
    assert metrics["groups/all_correct"] == pytest.approx(1 / 3)
    assert metrics["groups/all_wrong"] == pytest.approx(2 / 3)
    assert metrics["groups/no_signal"] == pytest.approx(2 / 3)
    assert "reward/format" not in metrics and "rollout/length_wrong" in metrics
    assert "rollout/length_wrong" not in group_metrics([right])


def test_language_consistency_is_a_metric_of_the_phase() -> None:
    one = group(completion(3, 1.25, language=0.25), completion(3, 1.0, language=0.0))
    for share, c in zip((0.25, 0.0), one.completions, strict=True):
        assert c.score is not None
        c.score.language = LanguageUse(target="zh", words=8.0, target_words=8 * share)
    metrics = group_metrics([one])
    found = {name: value for name, value in metrics.items() if name.startswith("reward/language")}
    assert found == {
        "reward/language": 0.125,
        "reward/language/zh": 0.125,
        "reward/language_prompts/zh": 1.0,
        "reward/language_no_words": 0.0,
    }
    check_names(list(metrics))


def test_no_answer_wins_no_majority() -> None:
    """A verifier that judges without extracting (extracted None) casts no vote."""
    metrics = group_metrics([group(completion(3, 1.0, "correct", None), completion(3, 0.0, "wrong", None))])
    assert (metrics["reward/majority"], metrics["reward/accuracy"]) == (0.0, 0.5)


def test_no_signal_is_what_the_filter_drops() -> None:
    """0.1 + 0.2 against 0.3: a rounding difference is no signal, in the metric as in the filter."""
    same = group(completion(3, 0.1 + 0.2), completion(3, 0.3))
    assert len(set(same.rewards)) == 2
    assert group_metrics([same])["groups/no_signal"] == 1


def test_samples_carry_the_advantage_of_their_completion() -> None:
    one = group(completion(2, 1.0), completion(3, 0.0, "wrong"), completion(1, 0.5))
    samples = group_samples([one], AdvantageConfig(epsilon=0.0))
    assert [s.token_ids for s in samples] == [[7, 8, 0, 1], [7, 8, 0, 1, 2], [7, 8, 0]]
    assert {s.prompt_length for s in samples} == {2}
    assert [s.rollout_log_probs for s in samples] == [[-0.5] * 2, [-0.5] * 3, [-0.5]]
    step = math.sqrt(3 / 2)  # 0.5 over the population deviation sqrt(1/6)
    assert [s.advantage for s in samples] == pytest.approx([step, -step, 0.0])


def test_repeated_prompts_get_ids_of_their_own() -> None:
    renamed = distinct([prompt("a"), prompt("b"), prompt("a"), prompt("a")])
    assert [p.id for p in renamed] == ["a", "b", "a#2", "a#3"]
    assert [dataclasses.replace(p, id="") for p in renamed] == [
        dataclasses.replace(prompt(name), id="") for name in "abaa"
    ]


class Cursor:
    """Prompts p0, p1, ... for ever."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int, step: int, steps: int) -> list[Prompt]:
        self.taken += count
        return [prompt(f"p{i}") for i in range(self.taken - count, self.taken)]


class Engine:
    """Rewards of a prompt's two completions, by its number; equal ones give no signal."""

    def __init__(self, rewards: Sequence[tuple[float, float]]) -> None:
        self.rewards, self.seeds = rewards, []

    def generate(self, prompts: list[Prompt], n: int, sampling: Any, seed: int, progress: Any) -> Any:
        self.seeds.append(seed)
        return [[completion(3, r) for r in self.rewards[int(p.id[1:]) % len(self.rewards)]] for p in prompts]


class NoScorer:
    """The completions come scored."""

    def score_groups(self, groups: list[Group], step: int, steps: int) -> RewardStats:
        assert groups
        return RewardStats(completions=sum(len(group.completions) for group in groups), verdicts={})


def stage(**grpo: Any) -> GrpoStage:
    return GrpoStage.model_validate(
        {
            "name": "rl",
            "kind": "grpo",
            "steps": 1,
            "optimizer": {"lr": 1e-3},
            "prompts": {"source": "generator", "task": "chain_sum"},
            "reward": [{"kind": "accuracy"}],
            "grpo": {"prompts": 2, "group_size": 2, "minibatches": 1, **grpo},
        }
    )


def sampled(world: World, engine: Engine, **grpo: Any) -> Any:
    return sample_groups(stage(**grpo), Cursor(), 0, engine, NoScorer(), world, 100, None)  # type: ignore[arg-type]


def names(groups: list[Group]) -> list[str]:
    return [g.prompt.id for g in groups]


def test_groups_without_signal_are_kept_by_default(world: World) -> None:
    result = sampled(world, Engine([(1, 0), (1, 1)]))
    assert names(result.kept) == names(result.groups) == ["p0", "p1"]
    assert (result.metrics["groups/dropped"], result.metrics["groups/rounds"]) == (0, 1)


def test_dropped_groups_are_counted_and_still_reported(world: World) -> None:
    result = sampled(world, Engine([(1, 0), (1, 1)]), no_signal="drop")
    assert (names(result.kept), names(result.groups)) == (["p0"], ["p0", "p1"])
    assert (result.metrics["groups/dropped"], result.metrics["groups/no_signal"]) == (1, 0.5)


def test_dynamic_sampling_refills_with_further_prompts(world: World) -> None:
    engine = Engine([(1, 1), (1, 0), (0, 0), (0, 1)])
    result = sampled(world, engine, no_signal="drop", dynamic_sampling=True)
    assert names(result.kept) == ["p1", "p3"] and names(result.groups) == ["p0", "p1", "p2", "p3"]
    assert engine.seeds == [100, 101], "every round draws other random numbers"
    assert (result.metrics["groups/rounds"], result.metrics["groups/dropped"]) == (2, 2)


def test_dynamic_sampling_goes_on_with_what_there_is(world: World) -> None:
    engine = Engine([(1, 0), *[(1, 1)] * 99])
    result = sampled(world, engine, no_signal="drop", dynamic_sampling=True, max_resampling=3)
    assert names(result.kept) == ["p0"] and len(engine.seeds) == 3


class Sources(Cursor):
    """Each take asks source 0, then 0, then 1; the answers' rewards are those of the prompt's number."""

    def take(self, count: int, step: int, steps: int) -> list[Prompt]:
        asked = super().take(count, step, steps)
        return [dataclasses.replace(p, source=int(i % 3 == 2)) for i, p in enumerate(asked)]


def test_dynamic_sampling_keeps_the_shares_of_the_sources(world: World) -> None:
    """Prompts 2 and 5 are the second source's. The first round gives it nothing, the first source one: a phase cut at 3
    would be p0, p3, p4 of the first source alone."""
    engine = Engine([(1, 0), (1, 1), (1, 1), (1, 0), (1, 0), (0, 1)])
    grpo = {"prompts": 3, "group_size": 2, "minibatches": 1, "no_signal": "drop", "dynamic_sampling": True}
    result = sample_groups(stage(**grpo), Sources(), 0, engine, NoScorer(), world, 100, None)  # type: ignore[arg-type]
    assert names(result.kept) == ["p0", "p3", "p5"]


def test_a_source_without_signal_leaves_its_places_to_the_others(world: World) -> None:
    engine = Engine([(1, 0), (0, 1), (1, 1)])
    grpo = {"prompts": 3, "no_signal": "drop", "dynamic_sampling": True, "max_resampling": 2}
    result = sample_groups(stage(**grpo), Sources(), 0, engine, NoScorer(), world, 100, None)  # type: ignore[arg-type]
    assert names(result.kept) == ["p0", "p1", "p3"] and result.metrics["groups/rounds"] == 2


def test_a_phase_without_any_signal_ends_the_run_with_a_cure(world: World) -> None:
    with pytest.raises(NoSignal, match=r'128 groups in a row .* stage\.rl\.grpo\.no_signal = "drop"'):
        sampled(world, Engine([(1, 1)]), no_signal="drop")
