"""Generated pre-training text: a small "web" whose documents answer a task in a mixture of styles.

Feeds the `pretrain` stage, which makes the base model that R1-Zero starts from: one that mostly
guesses, yet has seen reasoning and so can learn to prefer it. Document i is a pure function of
(configuration, seed, i), which is all that resuming needs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from megatron_r1.config.data import CorpusConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.generators import build_task, keyed_random
from megatron_r1.data.heldout import question_hash
from megatron_r1.data.tasks import Problem, Task
from megatron_r1.data.wording import WORDINGS, thought_in

MAX_EXCLUDED_RUN = 10_000
"""Held-out documents in a row after which the corpus is taken to hold nothing else."""


TAG = r"</?(?:think|answer)>"
_WAIT = rf"\bwait\b|{WORDINGS['zh'].wait}"


class Document(NamedTuple):
    """A question and the text that follows it, which is what is learned."""

    prompt: str
    body: str
    style: str


class Writer(NamedTuple):
    """What a style needs to write the answer to a problem."""

    task: Task
    problem: Problem
    rng: random.Random
    error_rate: float
    guess_accuracy: float

    def guess(self) -> str:
        """The right answer with chance `guess_accuracy`, else a near miss."""
        right = self.rng.random() < self.guess_accuracy
        return self.problem.answer if right else self.task.near_miss(self.problem, self.rng)

    def work(self, backwards: bool = False) -> tuple[str, str]:
        """(steps, the answer they end in)."""
        return self.task.work(self.problem, self.rng, self.error_rate, backwards)


def _tagged(reasoning: str, answer: str) -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def _direct(writer: Writer) -> str:
    return _tagged("", writer.guess())


def _plain(writer: Writer) -> str:
    return f"{writer.guess()}."


def _steps(writer: Writer) -> str:
    return _tagged(*writer.work())


def _plain_steps(writer: Writer) -> str:
    steps, answer = writer.work()
    return f"{steps}; so {answer}."


def _check(writer: Writer) -> str:
    """Steps, then a re-check in the opposite order; where they differ, a third attempt decides."""
    steps, answer = writer.work()
    again, other = writer.work(backwards=True)
    if other == answer:
        return _tagged(f"{steps};wait {again};yes", answer)
    last, answer = writer.work()
    return _tagged(f"{steps};wait {again};wait {last}", answer)


STYLES: dict[str, Callable[[Writer], str]] = {
    "direct": _direct,  # tags, no reasoning, a guess
    "plain": _plain,  # a guess without tags
    "steps": _steps,  # tags, worked step by step
    "plain_steps": _plain_steps,  # worked step by step without tags
    "check": _check,  # tags, worked, then "wait" and worked again
}


WORKED = ("steps", "plain_steps", "check")
"""Styles with working, which can be put into words."""


def _in_words(body: str, languages: tuple[str, str], rng: random.Random) -> str:
    """A worked body with words before its steps, of the first language up to some word, of the second from there on.

    "<think>5-6=-1;-1+9=8</think>..." -> "<think>first 5-6=-1;then -1+9=8;so 8</think>...".
    """
    tagged = re.fullmatch(r"<think>(.+)</think><answer>(.+)</answer>", body)
    thought = f"{tagged[1]};so {tagged[2]}" if tagged else body
    first, second = (thought_in(thought, language) for language in languages)
    change = rng.randrange(1, len(first)) if languages[0] != languages[1] else len(first)
    said = "".join([*first[:change], *second[change:]])
    return _tagged(said, tagged[2]) if tagged else said


class Corpus:
    """An endless iterator over documents; `position` is the index of the next one.

    Args:
        config: task, difficulty and mixture.
        seed: of the run; it enters beside config.seed.
        exclude: question hashes (`data/heldout.py`) whose documents are skipped and counted in
            `excluded`.

    Raises:
        UserError: an unknown style, task or option, weights that are not positive, mixing without two languages.
    """

    def __init__(self, config: CorpusConfig, seed: int, exclude: frozenset[str] = frozenset()) -> None:
        _check_styles(config.styles)
        self.config = config
        self.seed = seed
        self.exclude = exclude
        self.position = 0
        self.excluded = 0
        self.task = build_task(config.task, config.options)
        if config.mixed and (self.task.languages is None or len(self.task.languages.weights) < 2):
            raise UserError(
                f"corpus.mixed = {config.mixed:g} needs two languages to change between; set options.languages of the "
                "task, as { en = 0.5, zh = 0.5 }, or remove mixed"
            )
        self._styles = list(config.styles)
        self._bounds = list(accumulate(config.styles.values()))

    def document(self, index: int) -> Document:
        """Document `index`, held out or not."""
        rng = keyed_random("corpus", self.config.task, self.config.seed, self.seed, index)
        problem = self.task.draw(rng)
        style = rng.choices(self._styles, cum_weights=self._bounds)[0]
        writer = Writer(self.task, problem, rng, self.config.error_rate, self.config.guess_accuracy)
        body = STYLES[style](writer)
        if self.task.languages is not None and style in WORKED:
            body = _in_words(body, self._languages(problem.metadata["language"], rng), rng)
        return Document(problem.question, body, style)

    def _languages(self, language: str, rng: random.Random) -> tuple[str, str]:
        """Those in which a thought begins and ends."""
        assert self.task.languages is not None, "a task without words has no languages"
        mixes = rng.random() < self.config.mixed
        return language, self.task.languages.draw_other(language, rng) if mixes else language

    def __iter__(self) -> Corpus:
        return self

    def __next__(self) -> Document:
        for _ in range(MAX_EXCLUDED_RUN):
            document = self.document(self.position)
            self.position += 1
            if not self.exclude or question_hash(document.prompt) not in self.exclude:
                return document
            self.excluded += 1
        raise UserError(
            f"corpus {self.config.task} with options {self.config.options}: {MAX_EXCLUDED_RUN} "
            "documents in a row ask held-out questions, so nothing is left to train on; make the "
            "task larger or hold out fewer problems"
        )

    def state(self) -> dict[str, Any]:
        """Where the iterator stands, as JSON."""
        return {"position": self.position, "excluded": self.excluded}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.position = int(state["position"])
        self.excluded = int(state["excluded"])


def classify_style(text: str) -> str:
    """The style of a completion's whole text: a key of `STYLES`, or "other" for malformed tags.

    Reads form alone, so a sampled completion counts whatever its answer is.
    """
    tagged = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
    if tagged:
        reasoning, answer = tagged.groups()
        if re.search(TAG, reasoning + answer):
            return "other"
        if not reasoning.strip():
            return "direct"
        return "check" if re.search(_WAIT, reasoning, re.IGNORECASE) else "steps"
    if not text.strip() or re.search(TAG, text):
        return "other"
    return "plain_steps" if re.search(r"[=;]", text) else "plain"


def _check_styles(styles: dict[str, float]) -> None:
    unknown = [style for style in styles if style not in STYLES]
    if unknown:
        raise UserError(f"corpus.styles: unknown style {', '.join(unknown)}; allowed are {', '.join(STYLES)}")
    wrong = [f"{style} = {weight}" for style, weight in styles.items() if not 0 <= weight < float("inf")]
    if wrong or not sum(styles.values()) > 0:
        raise UserError(
            f"corpus.styles: {', '.join(wrong) or 'no style has a weight'}; weights are 0 or more "
            "and at least one is above 0"
        )
