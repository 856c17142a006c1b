"""The few words of generated questions and thoughts, in the languages that they can be written in.

Used by the tasks (`data/generators.py`: how a question is put) and the corpus (`data/corpus.py`: what connects the
steps of a thought). Without them a thought is numbers alone, which are in no language.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_r1.config.errors import UserError


class Wording(NamedTuple):
    """The words of one language, each with the space that follows it, if any."""

    compute: str
    first: str
    then: str
    so: str
    wait: str
    yes: str


WORDINGS: dict[str, Wording] = {
    "en": Wording(compute="compute ", first="first ", then="then ", so="so ", wait="wait ", yes="yes"),
    "zh": Wording(compute="计算", first="首先", then="然后", so="所以", wait="等等", yes="对"),
}
"""Language code -> its words."""


class Languages:
    """The languages of a task's questions, by weight; read from its option `languages`.

    Raises UserError for a language without words here, or weights that are not positive.
    """

    def __init__(self, task: str, given: Any) -> None:
        shown = f"task {task}: languages = {given!r}"
        if not isinstance(given, Mapping) or not all(type(weight) in (int, float) for weight in given.values()):
            raise UserError(f"{shown}; allowed is a table of language = weight, as {{ en = 0.5, zh = 0.5 }}")
        unknown = [code for code in given if code not in WORDINGS]
        if unknown:
            raise UserError(f"{shown}: no words for {', '.join(unknown)}; allowed are {', '.join(WORDINGS)}")
        if not all(0 <= weight < float("inf") for weight in given.values()) or not sum(given.values()) > 0:
            raise UserError(f"{shown}; weights are 0 or more and at least one is above 0")
        self.weights = {str(code): float(weight) for code, weight in given.items() if weight > 0}

    def draw(self, rng: random.Random) -> str:
        """A language, by its weight."""
        return rng.choices(list(self.weights), list(self.weights.values()))[0]

    def draw_other(self, language: str, rng: random.Random) -> str:
        """One of the others, each as likely; there must be one."""
        return rng.choice([code for code in self.weights if code != language])


def question_in(language: str, question: str) -> str:
    """ "5-6+9=?" -> "compute 5-6+9=?" or "计算5-6+9=?"."""
    return WORDINGS[language].compute + question


def thought_in(thought: str, language: str) -> list[str]:
    """A thought of the corpus in words of a language; joined, the list is the text. Each element begins with one word.

    "5-6=-1;-1+9=8;so 8" -> ["first 5-6=-1;", "then -1+9=8;", "so 8"]. A "wait" begins anew: ["wait ", "first 9-6=3;"].
    Two languages give lists of the same length, so that a thought can change from one to the other.
    """
    words = WORDINGS[language]
    said = []
    *steps, last = thought.split(";")
    for number, step in enumerate([*(f"{step};" for step in steps), last]):
        text = step.lstrip()
        if text.startswith("wait "):
            said += [words.wait, words.first + text.removeprefix("wait ")]
        elif text.startswith("so "):
            said.append(words.so + text.removeprefix("so "))
        elif text.startswith("yes"):
            said.append(words.yes + text.removeprefix("yes"))
        else:
            said.append((words.then if number else words.first) + text)
    return said
