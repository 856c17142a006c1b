"""Metrics of a phase with several domains, by hand: general prompts do not dilute the accuracy of the others."""

from __future__ import annotations

import pytest

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.observe.names import check_names, metric_of, name_of
from megatron_r1.rewards.mixer import NOT_JUDGED
from megatron_r1.train.phase_metrics import group_metrics
from megatron_r1.types import Completion, Group, LanguageUse, Prompt, Score, Verdict

REWARDS = [
    RewardConfig(kind="accuracy", domains=["reasoning"]),
    RewardConfig(kind="format", weight=0.5, domains=["reasoning", "safety"]),
    RewardConfig(kind="language", domains=["reasoning"]),
    RewardConfig(kind="model", name="helpful", url="http://x:1", domains=["general"]),
    RewardConfig(kind="model", name="safe", url="http://x:2", domains=["safety"]),
]


def group(domain: str, *completions: Completion) -> Group:
    prompt = Prompt(id=domain, question="?", text="?", token_ids=[1], answer=None, verifier="none", domain=domain)
    return Group(prompt=prompt, completions=list(completions))


def judged(length: int, status: str, extracted: str, formed: bool) -> Completion:
    """Of a reasoning prompt; its reward is 1 if correct, and 1/2 for the format."""
    verdict = Verdict(status=status, extracted=extracted)  # type: ignore[arg-type]
    parts = {"accuracy": float(status == "correct"), "format": 0.5 * formed, "helpful": 0.0, "safe": 0.0}
    return completion(length, verdict, parts, LanguageUse(target="en", words=4.0, target_words=1.0), {})


def valued(length: int, name: str, value: float, formed: bool = False) -> Completion:
    """Of a general prompt, whose words are all of the target language."""
    parts = {"accuracy": 0.0, "format": 0.5 * formed, "helpful": 0.0, "safe": 0.0, name: value}
    use = LanguageUse(target="en", words=4.0, target_words=4.0)
    return completion(length, Verdict(status="unknown", extracted="4", detail=NOT_JUDGED), parts, use, {name: value})


def completion(
    length: int, verdict: Verdict, parts: dict[str, float], use: LanguageUse, values: dict[str, float]
) -> Completion:
    return Completion(
        token_ids=[0] * length,
        log_probs=[0.0] * length,
        finish_reason="stop",
        weight_versions=(0, 0),
        text="",
        score=Score(
            total=sum(parts.values()), parts=parts, verdict=verdict, language=use, in_format=parts["format"] > 0
        ),
        values=values,
    )


def phase() -> list[Group]:
    return [
        group("reasoning", judged(2, "correct", "4", True), judged(4, "wrong", "5", False)),
        group("reasoning", judged(6, "correct", "4", True), judged(8, "correct", "4", True)),
        group("general", valued(100, "helpful", 3.0), valued(100, "helpful", -1.0)),
        group("safety", valued(50, "safe", 0.25, True), valued(50, "safe", 0.25)),
    ]


def test_each_term_is_measured_on_what_it_covers() -> None:
    metrics = group_metrics(phase(), REWARDS)
    expected = {
        "reward/accuracy": 3 / 4,
        "reward/majority": 1.0,  # of the first group both answers have one vote; the first seen, "4", is right
        "verdict/unknown": 0.0,
        "groups/all_correct": 1 / 2,
        "groups/all_wrong": 0.0,
        "rollout/length_correct": 16 / 3,
        "rollout/length_wrong": 4.0,
        "reward/format": 4 / 6,  # without the general group
        "reward/language": 1 / 4,
        "reward/model/helpful": 1.0,
        "reward/model_std/helpful": 2.0,
        "reward/model/safe": 0.25,
        "reward/model_std/safe": 0.0,
        "groups/prompts/reasoning": 2.0,
        "groups/prompts/general": 1.0,
        "groups/prompts/safety": 1.0,
        "reward/mean/reasoning": (1.5 + 0 + 1.5 + 1.5) / 4,
        "reward/mean/general": 1.0,
        "reward/mean/safety": 0.5,
        "rollout/length": 320 / 8,
        "groups/no_signal": 1 / 4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    check_names(list(metrics))


def test_a_phase_that_nobody_judges_has_no_accuracy() -> None:
    metrics = group_metrics(phase()[2:3], REWARDS)
    absent = ("reward/accuracy", "reward/majority", "verdict/unknown", "groups/all_correct", "groups/prompts/general")
    assert not [name for name in absent if name in metrics]
    assert metrics["reward/model/helpful"] == 1.0


def test_names_of_models_and_domains() -> None:
    assert name_of("reward/model/helpful") == "helpful" and name_of("reward/accuracy/x") is None
    helpful, plain = metric_of("reward/model/helpful"), metric_of("reward/model")
    assert helpful is not None and helpful == plain
    with pytest.raises(ValueError, match="unknown metrics"):
        check_names(["reward/model/Helpful"])
