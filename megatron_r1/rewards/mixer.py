"""Scores groups: extracts the answers, judges each distinct one once, and adds up the weighted
rewards.

Stands between rollout and the advantages: `Scorer.score_groups` fills `Completion.score` in place.
The order of the work: extract -> settle cheaply in this process -> the rest through the
`VerifierPool` -> mix.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_r1.config.data import RewardConfig
from megatron_r1.config.errors import UserError
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

    `pool` judges the KILLABLE verifiers; it starts no process before one is needed and stays the
    caller's to close. Raises UserError if two terms have the same kind or there is none.
    """

    def __init__(self, rewards: Sequence[RewardConfig], pool: VerifierPool) -> None:
        kinds = [reward.kind for reward in rewards]
        for kind, count in Counter(kinds).items():
            if count > 1:
                raise UserError(
                    f"[[stage.reward]]: kind {kind!r} is given {count} times, but each kind may be "
                    "given once; keep one table and add up the weights"
                )
        if not kinds:
            raise UserError(
                'no [[stage.reward]] is given; add at least one with kind "accuracy", "format" or "language", '
                "or every completion has the reward 0 and nothing is learned"
            )
        self._rewards = list(rewards)
        self._accuracy = next((reward for reward in rewards if reward.kind == "accuracy"), None)
        self._language = next((reward for reward in rewards if reward.kind == "language"), None)
        self._pool = pool

    def score_groups(self, groups: Sequence[Group]) -> RewardStats:
        """Fill the `score` of every completion, replacing an earlier one, and return the counts.

        A completion without an answer (`extract_answer`) is wrong with the detail "no answer". An
        `unknown` verdict counts `RewardConfig.unknown` instead of 0 or 1. Without an accuracy
        reward nothing is judged: the verdicts are unknown with the detail "no accuracy reward".
        Raises UserError for a prompt whose verifier does not exist or is not installed.
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
                completion.score = self._score(completion, verdict, use)
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
        if self._accuracy is None:
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

    def _score(self, completion: Completion, verdict: Verdict, use: LanguageUse | None) -> Score:
        parts: dict[str, float] = {}
        for reward in self._rewards:
            if reward.kind == "format":
                raw = float(format_reward(completion))
            elif reward.kind == "language":
                assert use is not None, "the language reward counts words"
                raw = use.share
            elif verdict.status == "unknown":
                raw = reward.unknown
            else:
                raw = float(verdict.status == "correct")
            parts[reward.kind] = reward.weight * raw
        return Score(total=sum(parts.values()), parts=parts, verdict=verdict, language=use)


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
