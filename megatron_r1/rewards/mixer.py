"""Scores groups: extracts the answers, judges each distinct one once, and adds up the weighted
rewards.

Stands between rollout and the advantages: `Scorer.score_groups` fills `Completion.score` in place.
The order of the work: extract -> settle cheaply in this process -> the rest through the
`VerifierPool` -> mix. Values of reward models are in `Completion.values` by then (`train/reward_models.py`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.accuracy import KILLABLE, SHORTCUTS, VERIFIERS, guarded
from megatron_r1.rewards.canonical import vote_key
from megatron_r1.rewards.extract import extract_answer
from megatron_r1.rewards.format import format_reward
from megatron_r1.rewards.language import language_use, target_language
from megatron_r1.rewards.workers import Job, VerifierPool
from megatron_r1.types import Completion, Group, LanguageUse, Prompt, Score, Verdict

NO_ANSWER = "no answer"
NOT_JUDGED = "no accuracy reward"

_Key = tuple[str, str | None, str, str]  # verifier, reference, prompt id, answer


@dataclass(kw_only=True, slots=True)
class RewardStats:
    """What one call of `score_groups` did; every completion is counted once in `verdicts`.

    Example: RewardStats(completions=256, verdicts={"correct": 90, "wrong": 165, "unknown": 1},
    unknown={"deadline 1.0 s": 1}, no_answer=12, judged=77, pooled=9, seconds=1.2).
    """

    completions: int
    verdicts: dict[str, int]  # always has the three statuses
    # Reason, i.e. the verdict's detail up to the first colon -> completions.
    unknown: dict[str, int] = field(default_factory=dict)
    no_answer: int = 0  # completions without an extractable answer, part of verdicts["wrong"]
    judged: int = 0  # distinct (prompt, answer) pairs
    pooled: int = 0  # of these, judged by worker processes
    seconds: float = 0.0  # wall clock


class Scorer:
    """The reward of a run: the weighted sum of its `[[stage.reward]]` terms.

    A term is a part of every score: 0 for prompts of a domain that it does not cover and in phases before its
    `last_steps`, so that parts have the same names in all completions of a stage.
    `pool` judges the KILLABLE verifiers; it starts no process before one is needed and stays the
    caller's to close. Raises UserError if two terms have the same kind (reward models: the same name) or there is
    none.
    """

    def __init__(self, rewards: Sequence[RewardConfig], pool: VerifierPool) -> None:
        check_labels(rewards)
        if not rewards:
            raise UserError(
                'no [[stage.reward]] is given; add at least one with kind "accuracy", "format", "language" or "model", '
                "or every completion has the reward 0 and nothing is learned"
            )
        self._rewards = list(rewards)
        self._accuracy = next((reward for reward in rewards if reward.kind == "accuracy"), None)
        self._language = next((reward for reward in rewards if reward.kind == "language"), None)
        self._format = next((reward for reward in rewards if reward.kind == "format"), None)
        self._pool = pool

    def score_groups(self, groups: Sequence[Group], step: int = 0, steps: int = 0) -> RewardStats:
        """Fill the `score` of every completion, replacing an earlier one, and return the counts.

        step, steps: optimizer steps done when the phase began, and of the whole stage; they decide which terms count
        (`RewardConfig.active`). By default all do.

        A completion without an answer (`extract_answer`) is wrong with the detail "no answer". An
        `unknown` verdict counts `RewardConfig.unknown` instead of 0 or 1. Where no accuracy reward covers the prompt
        nothing is judged: the verdicts are unknown with the detail "no accuracy reward". Accuracy, format and language
        are measured in every phase, whether they count or not.
        Raises UserError for a prompt whose verifier does not exist or is not installed, and ValueError for a completion
        without a finite value of a reward model that scores it.
        """
        begin = time.perf_counter()
        answers = [[extract_answer(c.text) for c in group.completions] for group in groups]
        verdicts, pooled = self._judge(groups, answers) if self._accuracy else ({}, 0)
        counts: Counter[str] = Counter({"correct": 0, "wrong": 0, "unknown": 0})
        reasons: Counter[str] = Counter()
        for group, group_answers in zip(groups, answers, strict=True):
            uses = self._language_uses(group)
            for completion, answer, use in zip(group.completions, group_answers, uses, strict=True):
                verdict = self._verdict(group.prompt, answer, verdicts)
                completion.score = self._score(group.prompt, completion, verdict, use, step, steps)
                counts[verdict.status] += 1
                if verdict.status == "unknown":
                    reasons[verdict.detail.split(":")[0]] += 1
        return RewardStats(
            completions=sum(counts.values()),
            verdicts=dict(counts),
            unknown=dict(reasons),
            no_answer=sum(answer is None for row in answers for answer in row),
            judged=len(verdicts),
            pooled=pooled,
            seconds=time.perf_counter() - begin,
        )

    def _judge(self, groups: Sequence[Group], answers: list[list[str | None]]) -> tuple[dict[_Key, Verdict], int]:
        """Return a verdict for each distinct (prompt, answer), and how many workers gave."""
        assert self._accuracy is not None, "judging needs an accuracy reward"
        verdicts: dict[_Key, Verdict] = {}
        jobs: dict[_Key, Job] = {}
        for group, group_answers in zip(groups, answers, strict=True):
            prompt = group.prompt
            if not self._accuracy.covers(prompt.domain):
                continue
            if prompt.verifier not in VERIFIERS:
                raise UserError(
                    f"prompt {prompt.id}: verifier {prompt.verifier!r} does not exist; "
                    f"set `verifier` of the prompt source to one of {', '.join(sorted(VERIFIERS))}"
                )
            for answer in dict.fromkeys(group_answers):
                if answer is None or (key := _key(prompt, answer)) in verdicts or key in jobs:
                    continue
                settled = _settle(answer, prompt)
                if settled is None:
                    jobs[key] = Job(verifier=prompt.verifier, answer=answer, prompt=prompt)
                else:
                    verdicts[key] = settled
        judged = self._pool.verify_many(list(jobs.values()), self._accuracy.deadline) if jobs else []
        return verdicts | dict(zip(jobs, judged, strict=True)), len(jobs)

    def _verdict(self, prompt: Prompt, answer: str | None, verdicts: dict[_Key, Verdict]) -> Verdict:
        if self._accuracy is None or not self._accuracy.covers(prompt.domain):
            extracted = None if answer is None else vote_key(answer)
            return Verdict(status="unknown", extracted=extracted, detail=NOT_JUDGED)
        if answer is None:
            return Verdict(status="wrong", detail=NO_ANSWER)
        # A copy: completions share no mutable object.
        return replace(verdicts[_key(prompt, answer)])

    def _language_uses(self, group: Group) -> list[LanguageUse] | list[None]:
        """[G] words of each thought; without a language reward they are not counted."""
        if self._language is None:
            return [None] * len(group.completions)
        han_per_word = self._language.han_per_word
        target = target_language(group.prompt, self._language.default_language, han_per_word)
        return [language_use(completion, target, han_per_word) for completion in group.completions]

    def _score(
        self, prompt: Prompt, completion: Completion, verdict: Verdict, use: LanguageUse | None, step: int, steps: int
    ) -> Score:
        parts: dict[str, float] = {}
        in_format = None if self._format is None else format_reward(completion, self._format.tags) > 0
        for reward in self._rewards:
            counts = reward.covers(prompt.domain) and reward.active(step, steps)
            raw = _raw(reward, prompt, completion, verdict, use, in_format) if counts else 0.0
            parts[reward.label] = reward.weight * raw
        return Score(total=sum(parts.values()), parts=parts, verdict=verdict, language=use, in_format=in_format)


def check_labels(rewards: Sequence[RewardConfig]) -> None:
    """Raise UserError when two terms have one label: the kind, or the name of a reward model."""
    for label, count in Counter(reward.label for reward in rewards).items():
        if count > 1 and any(reward.label == label and reward.kind == "model" for reward in rewards):
            raise UserError(f"[[stage.reward]]: {count} reward models are called {label!r}; give each its own `name`")
        if count > 1:
            raise UserError(
                f"[[stage.reward]]: kind {label!r} is given {count} times, but each kind may be "
                "given once; keep one table and add up the weights"
            )


def _raw(
    reward: RewardConfig,
    prompt: Prompt,
    completion: Completion,
    verdict: Verdict,
    use: LanguageUse | None,
    in_format: bool | None,
) -> float:
    """What a term says of a completion, before its weight."""
    if reward.kind == "format":
        return float(in_format or 0)
    if reward.kind == "language":
        assert use is not None, "the language reward counts words"
        return use.share
    if reward.kind == "model":
        return _model_value(reward, prompt, completion)
    return reward.unknown if verdict.status == "unknown" else float(verdict.status == "correct")


def _model_value(reward: RewardConfig, prompt: Prompt, completion: Completion) -> float:
    value = completion.values.get(reward.label)
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"a completion of prompt {prompt.id} has {'no value' if value is None else f'the value {value}'} of the "
            f"reward model {reward.label!r}, which scores the domain {prompt.domain!r}"
        )
    if reward.transform == "none":
        return value
    # Without overflow on either side.
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))


def _key(prompt: Prompt, answer: str) -> _Key:
    return prompt.verifier, prompt.answer, prompt.id, answer


def _settle(answer: str, prompt: Prompt) -> Verdict | None:
    """Judge here what cannot hang; None where a worker must."""
    if prompt.verifier not in KILLABLE:
        return guarded(prompt.verifier, answer, prompt)
    shortcut = SHORTCUTS.get(prompt.verifier)
    if shortcut is None:
        return None
    try:
        return shortcut(answer, prompt)
    except ValueError:  # a reference that is none: the verifier says so in its verdict
        return None
