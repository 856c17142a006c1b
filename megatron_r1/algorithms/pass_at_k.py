"""Statistics of an evaluation: after the verifiers, on plain lists.

Outer lists run over problems, inner lists over the samples of one problem.
R1 reports pass@1 as the mean over k samples and cons@64 as a majority vote (arXiv 2501.12948,
evaluation setup).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """Mean over problems of the mean over their samples, in [0, 1].

    Each problem counts once, however often it was sampled.

    Raises:
        ValueError: no problem, or a problem without a sample.
    """
    if not correct or not all(len(samples) for samples in correct):
        raise ValueError("pass@1 needs at least one problem and at least one sample of each")
    return math.fsum(sum(map(bool, samples)) / len(samples) for samples in correct) / len(correct)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased probability that of k samples at least one is correct: 1 - C(n - c, k) / C(n, k).

    Args:
        n: samples drawn of one problem.
        c: how many of them are correct.
        k: samples the estimate is for.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.

    Source: Codex (arXiv 2107.03374) eq. 1, as the product of its figure 3, which overflows nowhere.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n = {n}, c = {c}, k = {k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; a tie goes to the one seen first.

    None (nothing could be read) is no vote; without any vote the result is None. Answers count as
    equal when their strings are: bring them to one form first.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    # most_common orders equal counts by first appearance.
    return votes.most_common(1)[0][0] if votes else None


def cons_at_k(answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]], k: int) -> float:
    """Share of problems whose majority answer over the first k samples is correct, in [0, 1].

    A majority answer is correct if some sample that gave it was judged so: equal answers deserve
    equal verdicts, and a verifier that missed its deadline on one of them must not overrule the
    others.

    Args:
        answers: for each problem its samples' extracted answers, None where none could be read.
        correct: the verdicts, aligned with `answers`.
        k: samples that vote.

    Raises:
        ValueError: no problem, lists that are not aligned, or a problem with fewer than k samples.
    """
    if not answers or k < 1:
        raise ValueError(f"cons@k needs a problem and k >= 1, got {len(answers)} problems, k = {k}")
    hits = 0
    for index, (votes, verdicts) in enumerate(zip(answers, correct, strict=True)):
        if len(votes) != len(verdicts) or len(votes) < k:
            raise ValueError(
                f"problem {index} has {len(votes)} answers and {len(verdicts)} verdicts; "
                f"cons@{k} needs equally many, at least {k}"
            )
        winner = majority_vote(votes[:k])
        hits += winner is not None and any(
            verdict for vote, verdict in zip(votes[:k], verdicts[:k], strict=True) if vote == winner
        )
    return hits / len(answers)
