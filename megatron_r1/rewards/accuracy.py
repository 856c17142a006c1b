"""The verifiers: is the extracted answer the reference answer?

Each is a callable `(answer, prompt) -> Verdict` found by its name in `VERIFIERS`; `Prompt.verifier`
holds the name. `rewards/mixer.py` extracts the answers and calls them; those in `KILLABLE` run
third-party code on the model's text, which may never end, so only a worker process of
`rewards/workers.py` may call them. Nothing here imports torch.

`Verdict.extracted` is the canonical spelling of the answer, so that majority votes count "042" and
"42.0" as "42".
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Callable
from typing import Any

from megatron_r1.config.gym_tasks import REFUSED
from megatron_r1.rewards.canonical import canonical, number, plain, same, vote_key
from megatron_r1.rewards.requests import verify_helpful, verify_safe
from megatron_r1.types import Prompt, Verdict

Verifier = Callable[[str, Prompt], Verdict]

ACCEPT, JUDGE = "none", "judge"
"""Names of the verifiers that are no rule."""

_CHOICE = re.compile(
    r"(?:option|choice|选项?)?\s*(?:[(\[](?P<label>[A-H])[)\]]|(?P<bare>[A-H])(?=\s*[.:)]|$))(?P<tail>.*)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_CHOICE = re.compile(
    r"(?<![A-Za-z])[A-H](?=[.:)])|\([A-Ha-h]\)|(?:\b(?i:or|and)\s+|[,/&;或和、]\s*)[A-H](?![A-Za-z])"
)
_UNIT = re.compile(
    r"(?<=[0-9}])\s*(?:nm|mm|cm|dm|m|km|mg|g|kg|ms|s|min|h|ml|l|L|J|kJ|W|kW|N|Pa|V|A|K|Hz)(?:\^\{?[23]\}?)?$"
)


def verify_integer(answer: str, prompt: Prompt) -> Verdict:
    """Exact rational equality of two written numbers: "8", "+8", "008", "8.0", "16/2" and "1,000"
    are numbers.

    Nothing is evaluated or rounded: "5+3" is no number, 0.333333 is not 1/3, "800%" is not 8.
    Raises ValueError if the reference is no number, which is a fault of the data set and not of the
    answer.
    """
    reference = number(canonical(_reference(prompt)))
    if reference is None:
        raise ValueError(f"the reference answer {prompt.answer!r} is not a number")
    value = None if "%" in answer else number(canonical(answer))
    return _verdict(value == reference, answer)


def verify_exact(answer: str, prompt: Prompt) -> Verdict:
    """Equal text after normalisation: outer `$`, quotes and final full stops off, spaces merged,
    letter case ignored.
    """
    ours, theirs = _words(answer), _words(_reference(prompt))
    return Verdict(status="correct" if ours == theirs else "wrong", extracted=ours)


def verify_choice(answer: str, prompt: Prompt) -> Verdict:
    """One letter A-H: "B", "b", "(B)", "\\text{(B)}", "B.", "B) Paris", "option B". A second
    labelled letter is a hedge.

    Raises ValueError if the reference is not such a letter.
    """
    reference = _choice(_reference(prompt))
    if reference is None:
        raise ValueError(f"the reference answer {prompt.answer!r} is not one letter from A to H")
    letter = _choice(answer)
    return Verdict(status="correct" if letter == reference else "wrong", extracted=letter or vote_key(answer))


def settle_math(answer: str, prompt: Prompt) -> Verdict | None:
    """The cheap half of `verify_math`, safe in any process: a verdict if spelling and exact value
    settle it, or None.
    """
    decision = same(answer, _reference(prompt))
    if decision is None and (unit := _unit(answer)) and (other := _unit(_reference(prompt))):
        # math-verify drops units: 5 m would pass for 5 cm.
        decision = None if unit == other else False
    return None if decision is None else _verdict(decision, answer)


def verify_math(answer: str, prompt: Prompt) -> Verdict:
    """`settle_math`, else equality as math-verify sees it. KILLABLE: `9^{9^{9^9}}` keeps it busy
    for ever.

    math-verify reads only the extracted answer, put in a box of its own; relations compare with
    sets (0<x<1 and (0,1)); numbers must agree to 10 decimals (its default of 6 takes 0.333333 for
    1/3). Its own time-outs are off: they need the main thread, raise a BaseException and leave
    big-integer arithmetic running; the worker is killed instead. It evaluates, so "2+2" passes for
    4: give tasks of pure arithmetic the verifier "integer". Raises ValueError if the reference does
    not parse.
    """
    if (settled := settle_math(answer, prompt)) is not None:
        return settled
    from math_verify import verify

    reference = _parse_reference(_reference(prompt))
    if not reference:
        raise ValueError(f"the reference answer {prompt.answer!r} does not parse")
    parsed = _parse(plain(answer))
    correct = verify(
        reference,
        parsed,
        float_rounding=10,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
    return _verdict(bool(correct), answer)


def verify_reasoning_gym(answer: str, prompt: Prompt) -> Verdict:
    """The task's own scorer of reasoning-gym, correct at exactly 1.0. KILLABLE: some scorers run
    sympy on the text.

    `prompt.metadata` holds {"task": name, "entry": the data set's item}. Partial scores count as
    wrong: the default scorer pays 0.14 for "3 or 99" where 99 is right. Raises ValueError for tasks
    whose scorer cannot tell.
    """
    score = _reasoning_gym_scorer(prompt.metadata["task"])(answer, prompt.metadata["entry"])
    return _verdict(score == 1.0, answer)


def accept_any(answer: str, prompt: Prompt) -> Verdict:
    """Every answer is correct: for prompts that no rule and no judge is asked about."""
    return _verdict(True, answer)


def leave_to_judge(answer: str, prompt: Prompt) -> Verdict:
    """Unknown: a `sample` stage asks its judge, after the rules; nothing else does."""
    return Verdict(status="unknown", extracted=vote_key(answer), detail="left to a judge")


VERIFIERS: dict[str, Verifier] = {
    "integer": verify_integer,
    "exact": verify_exact,
    "math": verify_math,
    "choice": verify_choice,
    "reasoning_gym": verify_reasoning_gym,
    "helpful": verify_helpful,
    "safe": verify_safe,
    ACCEPT: accept_any,
    JUDGE: leave_to_judge,
}
"""Name -> verifier. They raise nothing for a bad answer; what they raise becomes the verdict
`unknown`.
"""

KILLABLE: frozenset[str] = frozenset({"math", "reasoning_gym"})
"""Verifiers that may hang or exhaust memory: run them through `VerifierPool` only."""

SHORTCUTS: dict[str, Callable[[str, Prompt], Verdict | None]] = {"math": settle_math}
"""KILLABLE verifier -> cheap rule that may settle the matter without a worker."""


def prepare(verifier: str, prompt: Prompt) -> None:
    """Import what the verifier needs, before its deadline starts to count. Raises ImportError if it
    is not there.
    """
    if verifier == "math":
        importlib.import_module("math_verify")
        # It warns that its time-outs are off; they are meant to be.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        _parse("1")  # its first parse builds tables for as long as ten others take
    elif verifier == "reasoning_gym":
        importlib.import_module("reasoning_gym")
        if prompt.metadata["task"] not in REFUSED:
            _reasoning_gym_scorer(prompt.metadata["task"])


def guarded(verifier: str, answer: str, prompt: Prompt) -> Verdict:
    """Run a verifier; whatever it raises becomes `unknown` with the detail "ValueError: ...".

    BaseException on purpose: math-verify's TimeoutException is one, and a scorer may call sys.exit.
    """
    try:
        return VERIFIERS[verifier](answer, prompt)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Verdict(status="unknown", extracted=vote_key(answer), detail=describe(error))


def describe(error: BaseException) -> str:
    """One line about an exception, at most 200 characters: "ValueError: ..."."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _verdict(correct: bool, answer: str) -> Verdict:
    return Verdict(status="correct" if correct else "wrong", extracted=vote_key(answer))


def _reference(prompt: Prompt) -> str:
    if prompt.answer is None or not prompt.answer.strip():
        raise ValueError("the prompt has no reference answer")
    return prompt.answer


def _words(text: str) -> str:
    return " ".join(plain(text).strip("\"'\u201c\u201d\u2018\u2019` ").rstrip(".").split()).casefold()


def _choice(text: str) -> str | None:
    match = _CHOICE.fullmatch(re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", plain(text)).strip())
    if match is None or _OTHER_CHOICE.search(match["tail"]):
        return None
    return str(match["label"] or match["bare"]).upper()


def _unit(text: str) -> str | None:
    match = _UNIT.search(canonical(text))
    return None if match is None else match[0].strip()


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # Braces that do not balance would end the box early, and what follows would be read as a
    # second answer.
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return []
    if depth:
        return []
    return list(parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True))


@functools.lru_cache(maxsize=1024)
def _parse_reference(reference: str) -> tuple[Any, ...] | list[Any]:
    return _parse(plain(reference))


@functools.lru_cache(maxsize=128)
def _reasoning_gym_scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    if task in REFUSED:
        raise ValueError(f"the reasoning_gym task {task!r} cannot be a reward: {REFUSED[task]}")
    import reasoning_gym

    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(task)
    return scorer
